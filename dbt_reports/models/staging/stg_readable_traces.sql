with

source as (select * from {{ source('raw', 'readable_traces') }}),

renamed as (
    select
        run_id,
        organism,
        model,
        variant,
        corpus,
        method,
        layer,
        counted_from,
        position,
        n_sequences,
        unbiased_bias_fraction,
        token_agreement,
        tokens,
    from source
)

select * from renamed
