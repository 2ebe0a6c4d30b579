with

source as (select * from {{ source('raw', 'itda_layers') }}),

renamed as (
    select
        run_id,
        organism,
        model,
        variant,
        corpus,
        method,
        layer,
        base_atoms + tuned_atoms as n_atoms,
        new_atoms,
        whole_fvu as tuned_fvu,
        difference_fvu,
        whole_l0 as l0,
    from source
)

select * from renamed
