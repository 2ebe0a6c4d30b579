with

source as (select * from {{ source('raw', 'crosscoder_causal') }}),

renamed as (
    select
        run_id,
        organism,
        model,
        variant,
        corpus,
        method,
        layer,
        latent_set as latents,
        action,
        kl_share,
        kl_share_low,
        kl_share_high,
    from source
)

select * from renamed
