with

organisms as (select organism, model, variant, label from {{ ref('stg_organisms') }}),

finished as (
    select organism, model, variant, step, method, count(*) as n_runs, max(finished_at) as finished_at
    from {{ ref('int_current_runs') }}
    group by organism, model, variant, step, method
),

expected as (
    select distinct
        organisms.organism,
        model,
        organisms.variant,
        organisms.label,
        finished.step,
        finished.method,
    from organisms
    inner join finished using (model)
    where finished.step <> 'calibration'
),

status as (
    select
        expected.organism,
        expected.model,
        expected.variant,
        expected.label,
        expected.step,
        expected.method,
        coalesce(finished.n_runs, 0) as n_runs,
        finished.finished_at,
        finished.finished_at is null as is_missing,
    from expected
    left join finished using (organism, model, variant, step, method)
)

select * from status
