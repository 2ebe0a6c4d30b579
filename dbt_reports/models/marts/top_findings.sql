with

findings as (select * from {{ ref('int_findings') }}),

shown as (
    select
        organism,
        model,
        variant,
        corpus,
        method,
        rank,
        kind,
        case when length(item) > 300 then left(item, 299) || '…' else item end as item,
        score,
        score_unit,
        layer,
        position,
        p_value,
        q_value,
    from findings
    where rank <= 20
)

select * from shown
