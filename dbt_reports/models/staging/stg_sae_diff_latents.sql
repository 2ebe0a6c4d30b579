with

source as (select * from {{ source('raw', 'sae_diff_latents') }}),

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
        latent,
        beta_ratio,
    from source
)

select * from renamed
