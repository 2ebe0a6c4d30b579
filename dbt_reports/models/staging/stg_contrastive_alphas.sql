with

source as (select * from {{ source('raw', 'contrastive_decoding_alphas') }}),

renamed as (
    select
        run_id,
        organism,
        model,
        variant,
        method,
        alpha,
    from source
)

select * from renamed
