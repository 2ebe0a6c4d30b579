with

source as (select * from {{ source('raw', 'expression') }}),

renamed as (
    select
        run_id,
        organism,
        model,
        variant,
        corpus,
        method,
        label,
        in_share,
        out_share,
        base_in_share,
        base_out_share,
        n_in,
        n_out,
    from source
)

select * from renamed
