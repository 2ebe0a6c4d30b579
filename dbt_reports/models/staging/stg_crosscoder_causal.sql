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
        "set" as latents,
        action,
        removed_share,
        removed_share_low,
        removed_share_high,
    from source
)

select * from renamed
