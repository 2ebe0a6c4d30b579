with

source as (select * from {{ source('raw', 'itda_tokens') }}),

renamed as (
    select
        run_id,
        organism,
        model,
        variant,
        corpus,
        method,
        layer,
        rank,
        token_id,
        token,
        weight,
    from source
)

select * from renamed
