with

findings as (select * from {{ ref('stg_findings') }}),

current_runs as (select run_id from {{ ref('int_current_runs') }} where step = 'diff'),

current_findings as (
    select
        *,
        case
            when kind = 'token' then nullif(lower(trim(replace(replace(item, 'Ġ', ' '), '▁', ' '))), '')
        end as word,
    from findings
    where run_id in (select run_id from current_runs)
)

select * from current_findings
