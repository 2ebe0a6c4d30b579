with

organisms as (select organism, model, variant, label, is_null_arm from {{ ref('stg_organisms') }}),

finished as (
    select organism, model, variant, stage, method, count(*) as n_runs, max(finished_at) as finished_at
    from {{ ref('int_current_runs') }}
    group by organism, model, variant, stage, method
),

expected as (
    select distinct
        organisms.organism,
        organisms.model,
        organisms.variant,
        organisms.label,
        finished.stage,
        finished.method,
    from organisms
    cross join finished
    where finished.stage <> 'calibration' and not (finished.stage = 'expression' and organisms.is_null_arm)
),

status as (
    select
        expected.organism,
        expected.model,
        expected.variant,
        expected.label,
        expected.stage,
        expected.method,
        coalesce(finished.n_runs, 0) as n_runs,
        finished.finished_at,
        finished.finished_at is null as is_missing,
    from expected
    left join finished using (organism, model, variant, stage, method)
)

select * from status
