with

current_runs as (select * from {{ ref('int_current_runs') }} where step = 'diff'),

computing as (
    select
        model,
        method,
        count(*) as n_runs,
        sum(compute_s) as compute_s,
        sum(shared_s) as shared_s,
    from current_runs
    group by model, method
),

investigating as (
    select
        model,
        method,
        investigator,
        sum(tokens_used)::bigint as tokens_used,
        sum(cost_usd) as investigation_usd,
    from {{ ref('int_hypotheses') }}
    group by model, method, investigator
),

grading as (
    select model, method, investigator, sum(cost_usd) as grading_usd
    from {{ ref('int_grades') }}
    group by model, method, investigator
),

detecting as (
    select
        model,
        method,
        investigator,
        count(distinct (organism, variant)) filter (detected and arm = 'organism') as n_detected,
    from {{ ref('outcomes') }}
    group by model, method, investigator
),

summed as (
    select
        coalesce(computing.model, investigating.model) as model,
        coalesce(computing.method, investigating.method) as method,
        coalesce(investigating.investigator, 'none') as investigator,
        coalesce(computing.n_runs, 0) as n_runs,
        computing.compute_s,
        computing.shared_s,
        coalesce(investigating.tokens_used, 0) as tokens_used,
        coalesce(investigating.investigation_usd, 0) as investigation_usd,
        coalesce(grading.grading_usd, 0) as grading_usd,
        coalesce(detecting.n_detected, 0) as n_detected,
    from computing
    full outer join investigating using (model, method)
    left join grading
        on investigating.model = grading.model
        and investigating.method = grading.method
        and investigating.investigator = grading.investigator
    left join detecting
        on investigating.model = detecting.model
        and investigating.method = detecting.method
        and investigating.investigator = detecting.investigator
),

per_detection as (
    select
        *,
        compute_s / nullif(n_detected, 0) as compute_s_per_detection,
        (investigation_usd + grading_usd) / nullif(n_detected, 0) as usd_per_detection,
    from summed
)

select * from per_detection
