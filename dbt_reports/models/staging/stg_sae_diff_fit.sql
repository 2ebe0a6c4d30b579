with

source as (select * from {{ source('raw', 'sae_diff_fit') }}),

renamed as (
    select
        run_id,
        organism,
        model,
        variant,
        corpus,
        method,
        layer,
        target,
        n_latents,
        fvu as difference_fvu,
        l0,
    from source
)

select * from renamed
