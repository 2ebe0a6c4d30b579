with

source as (select * from {{ source('raw', 'sae_diff_tokens') }}),

renamed as (
    select
        run_id,
        organism,
        model,
        variant,
        corpus,
        method,
        layer,
        token_id,
        token,
        score,
    from source
)

select * from renamed
