with

source as (select * from {{ source('raw', 'crosscoder_fits') }}),

renamed as (
    select
        run_id,
        organism,
        model,
        variant,
        corpus,
        method,
        layer,
        part,
        n_latents,
        fvu_tuned as tuned_fvu,
        fvu_difference as difference_fvu,
        l0,
    from source
)

select * from renamed
