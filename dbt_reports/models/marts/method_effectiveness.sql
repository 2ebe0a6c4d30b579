with

outcomes as (
    select
        *,
        arm = 'organism' and is_trial as is_organism,
        arm = 'organism' and top1 is not null as is_ranked_variant,
        is_null_arm and is_trial as is_null,
    from {{ ref('outcomes') }}
),

counts as (
    select
        model,
        method,
        investigator,
        grader,
        count(*) filter (is_organism) as n_organisms,
        count(*) filter (is_organism and asserted) as n_asserted,
        count(*) filter (is_organism and undecided) as n_undecided,
        count(top1) filter (is_organism) as n_ranked,
        count(*) filter (is_organism and top1) as n_top1,
        count(*) filter (is_organism and detected) as n_detected,
        avg(chance_top1) filter (is_organism) as chance_top1,
        count(reciprocal_rank) filter (is_organism) as n_reciprocal_ranks,
        sum(reciprocal_rank) filter (is_organism) as sum_reciprocal_rank,
        count(*) filter (is_ranked_variant) as n_variants,
        count(*) filter (is_ranked_variant and top1) as n_variants_top1,
        count(*) filter (is_ranked_variant and detected) as n_variants_detected,
        list(organism order by organism, variant) filter (is_ranked_variant) as clusters,
        list(top1::double order by organism, variant) filter (is_ranked_variant) as top1_values,
        list(detected::double order by organism, variant) filter (is_ranked_variant) as detected_values,
        count(false_positive) filter (is_null) as n_nulls,
        count(*) filter (is_null and false_positive) as n_false_positives,
        count(*) filter (arm = 'identical' and asserted) as n_identical_alarms,
        sum(n_scored) filter (is_organism)::integer as n_scored,
        sum(n_unscored) filter (is_organism)::integer as n_unscored,
        count(mean_score) filter (is_organism) as n_scored_organisms,
        avg(mean_score) filter (is_organism) as mean_score,
        sum((mean_score - 1) / 4) filter (is_organism) as sum_share_of_score,
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
        sum_reciprocal_rank / nullif(n_reciprocal_ranks, 0) as mrr,
        wilson(sum_reciprocal_rank, nullif(n_reciprocal_ranks, 0)).low as mrr_low,
        wilson(sum_reciprocal_rank, nullif(n_reciprocal_ranks, 0)).high as mrr_high,
        n_variants,
        n_variants_top1,
        {{ clustered_rate('n_variants_top1', 'n_variants', 'clusters', 'top1_values', 'variant_top1') }},
        n_variants_detected,
        {{ clustered_rate('n_variants_detected', 'n_variants', 'clusters', 'detected_values', 'variant_detection') }},
        n_nulls,
        n_false_positives,
        {{ exact_rate('n_false_positives', 'n_nulls', 'false_positive') }},
        n_identical_alarms,
        n_scored_organisms,
        mean_score,
        1 + 4 * wilson(sum_share_of_score, nullif(n_scored_organisms, 0)).low as mean_score_low,
        1 + 4 * wilson(sum_share_of_score, nullif(n_scored_organisms, 0)).high as mean_score_high,
        n_scored,
        n_unscored,
        n_unscored / nullif(n_scored + n_unscored, 0) as unscored_share,
    from counts
)

select * from rates
