with

outcomes as (select * from {{ ref('outcomes') }}),

counts as (
    select
        model,
        method,
        investigator,
        grader,
        count(*) filter (arm = 'organism') as n_organisms,
        count(*) filter (arm = 'organism' and asserted) as n_asserted,
        count(*) filter (arm = 'organism' and undecided) as n_undecided,
        count(top1) filter (arm = 'organism') as n_ranked,
        count(*) filter (arm = 'organism' and top1) as n_top1,
        count(*) filter (arm = 'organism' and detected) as n_detected,
        avg(chance_top1) filter (arm = 'organism') as chance_top1,
        count(reciprocal_rank) filter (arm = 'organism') as n_reciprocal_ranks,
        avg(reciprocal_rank) filter (arm = 'organism') as mrr,
        count(false_positive) as n_nulls,
        count(*) filter (false_positive) as n_false_positives,
        sum(n_scored) filter (arm = 'organism')::integer as n_scored,
        sum(n_unscored) filter (arm = 'organism')::integer as n_unscored,
        count(mean_score) filter (arm = 'organism') as n_scored_organisms,
        avg(mean_score) filter (arm = 'organism') as mean_score,
    from outcomes
    group by model, method, investigator, grader
),

rates as (
    select
        model,
        method,
        investigator,
        grader,
        n_organisms,
        n_asserted,
        n_undecided,
        {{ exact_rate('n_asserted', 'n_organisms', 'assert') }},
        n_ranked,
        n_top1,
        {{ exact_rate('n_top1', 'n_ranked', 'top1') }},
        chance_top1,
        n_detected,
        {{ exact_rate('n_detected', 'n_ranked', 'detection') }},
        n_reciprocal_ranks,
        mrr,
        {{ wilson('mrr', 'nullif(n_reciprocal_ranks, 0)', '-') }} as mrr_low,
        {{ wilson('mrr', 'nullif(n_reciprocal_ranks, 0)', '+') }} as mrr_high,
        n_nulls,
        n_false_positives,
        {{ exact_rate('n_false_positives', 'n_nulls', 'false_positive') }},
        n_scored_organisms,
        mean_score,
        1 + 4 * {{ wilson('(mean_score - 1) / 4', 'nullif(n_scored_organisms, 0)', '-') }} as mean_score_low,
        1 + 4 * {{ wilson('(mean_score - 1) / 4', 'nullif(n_scored_organisms, 0)', '+') }} as mean_score_high,
        n_scored,
        n_unscored,
        n_unscored / nullif(n_scored + n_unscored, 0) as unscored_share,
    from counts
)

select * from rates
