with

source as (select * from {{ source('raw', 'crosscoder_latents') }}),

renamed as (
    select
        run_id,
        organism,
        model,
        variant,
        corpus,
        method,
        layer,
        latent,
        scaling_class,
        difference_rms,
    from source
)

select * from renamed
