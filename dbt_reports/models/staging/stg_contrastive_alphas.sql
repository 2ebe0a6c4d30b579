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
        n_words_q05_random is not null as has_control,
    from source
)

select * from renamed
