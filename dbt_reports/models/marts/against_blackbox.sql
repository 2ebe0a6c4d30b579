with

trials as (
    select * from {{ ref('outcomes') }} where arm = 'organism' and is_trial and top1 is not null
),

sampled as (select * from trials where method = 'blackbox'),

paired as (
    select
        trials.model,
        trials.method,
        trials.investigator,
        trials.grader,
        count(*) as n_organisms,
        count(*) filter (trials.detected and sampled.detected) as n_both,
        count(*) filter (trials.detected and not sampled.detected) as n_only_method,
        count(*) filter (not trials.detected and sampled.detected) as n_only_blackbox,
        count(*) filter (not trials.detected and not sampled.detected) as n_neither,
    from trials
    inner join sampled using (organism, model, variant, investigator, grader)
    where trials.method <> 'blackbox'
    group by trials.model, trials.method, trials.investigator, trials.grader
),

tested as (
    select *, mcnemar_exact(n_only_method, n_only_blackbox) as p_value
    from paired
),

adjusted as (
    select
        model,
        investigator,
        grader,
        unnest(list(method order by method)) as method,
        unnest(holm(list(p_value order by method))) as p_holm,
    from tested
    group by model, investigator, grader
),

comparison as (
    select tested.*, adjusted.p_holm
    from tested
    inner join adjusted using (model, method, investigator, grader)
)

select * from comparison
