with

source as (select * from {{ source('raw', 'expression') }}),

renamed as (
    select
        run_id,
        organism,
        model,
        variant,
        corpus,
        method,
        label as expression,
        n_in,
        n_out,
        in_share,
        in_share_low,
        in_share_high,
        out_share,
        out_share_low,
        out_share_high,
        base_in_share,
        base_out_share,
    from source
)

select * from renamed
