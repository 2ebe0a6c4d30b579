with

source as (select * from {{ source('raw', 'itda_ablations') }}),

renamed as (
    select
        run_id,
        organism,
        model,
        variant,
        corpus,
        method,
        layer,
        ablated,
        how,
        removed,
        removed_low,
        removed_high,
    from source
)

select * from renamed
