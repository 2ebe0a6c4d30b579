with

source as (select * from {{ source('raw', 'crosscoder_tokens') }}),

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
        head,
        direction,
        rank,
        token_id,
        token,
        probability,
    from source
)

select * from renamed
