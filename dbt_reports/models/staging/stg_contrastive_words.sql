with

source as (select * from {{ source('raw', 'contrastive_decoding_words') }}),

renamed as (
    select
        run_id,
        organism,
        model,
        variant,
        method,
        direction,
        alpha,
        against,
        word,
        n_docs_plain,
        n_docs_amplified,
        z,
        p_value,
        q_value,
    from source
)

select * from renamed
