with

source as (select * from {{ source('raw', 'findings') }}),

renamed as (
    select
        run_id,
        organism,
        model,
        variant,
        corpus,
        method,
        rank,
        kind,
        item,
        score,
        score_unit,
        layer,
        position,
        p_value,
        q_value,
    from source
)

select * from renamed
