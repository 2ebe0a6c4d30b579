with

organisms as (select * from {{ ref('stg_organisms') }}),

outcomes as (select * from {{ ref('outcomes') }}),

expression as (
    select *
    from {{ ref('stg_expression') }}
    where expression <> 'not_applicable' and run_id in (
        select run_id from {{ ref('int_current_runs') }} where step = 'expression'
    )
),

results as (
    select organism, model, variant, count(distinct method) as n_methods_with_findings
    from {{ ref('method_words') }}
    group by organism, model, variant
),

-- a method counts once, by its best outcome over investigators and graders
methods as (
    select
        organism,
        model,
        variant,
        method,
        bool_or(coalesce(detected, false)) as detected,
        bool_or(asserted) as asserted,
        max(reciprocal_rank) as reciprocal_rank,
        max(margin) as margin,
    from outcomes
    group by organism, model, variant, method
),

judged as (
    select
        organism,
        model,
        variant,
        count(*) as n_methods,
        count(*) filter (asserted) as n_methods_asserting,
        count(*) filter (detected) as n_methods_identifying,
        string_agg(method, ', ' order by method) filter (detected) as identified_by,
        first(method order by margin desc nulls last, method) filter (detected) as best_method,
    from methods
    group by organism, model, variant
),

summary as (
    select
        organisms.organism,
        organisms.model,
        organisms.variant,
        organisms.label,
        organisms.type,
        organisms.arm,
        organisms.is_null_arm,
        organisms.description,
        organisms.kind,
        organisms.dilution,
        expression.expression,
        expression.n_in,
        expression.n_out,
        expression.in_share,
        expression.in_share_low,
        expression.in_share_high,
        expression.out_share,
        expression.out_share_low,
        expression.out_share_high,
        expression.base_in_share,
        expression.base_out_share,
        coalesce(results.n_methods_with_findings, 0) as n_methods_with_findings,
        coalesce(judged.n_methods, 0) as n_methods,
        coalesce(judged.n_methods_asserting, 0) as n_methods_asserting,
        coalesce(judged.n_methods_identifying, 0) as n_methods_identifying,
        judged.identified_by,
        judged.best_method,
    from organisms
    left join expression using (organism, model, variant)
    left join results using (organism, model, variant)
    left join judged using (organism, model, variant)
)

select * from summary
