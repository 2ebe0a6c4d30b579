with

agreement as (select * from {{ ref('int_trace_agreement') }}),

organisms as (select * from {{ ref('stg_organisms') }}),

-- the largest of many places is large by chance too, so the nulls are given the same choice
best as (
    select *
    from agreement
    qualify row_number() over (
        partition by organism, model, variant, compared
        order by agreement desc, layer desc, position nulls first
    ) = 1
),

pairs as (select best.*, label, arm, is_null_arm from best inner join organisms using (organism, model, variant)),

-- which nulls may judge which pair: diffing_core/agents/calibration.py
judged as (
    select
        pairs.organism,
        pairs.variant,
        pairs.model,
        pairs.compared,
        count(nulls.agreement) as n_nulls,
        {{ prediction_bound('nulls.agreement') }} as bound,
        (1 + count(*) filter (nulls.agreement >= pairs.agreement)) / (1 + count(nulls.agreement)) as p_value,
    from pairs
    left join pairs as nulls
        on pairs.model = nulls.model
        and pairs.compared = nulls.compared
        and nulls.arm in ('benign', 'seed_twin')
        and (pairs.organism, pairs.variant) <> (nulls.organism, nulls.variant)
        and not (nulls.arm = 'seed_twin' and pairs.organism = nulls.organism)
    group by pairs.organism, pairs.variant, pairs.model, pairs.compared
),

verdicts as (
    select
        pairs.organism,
        pairs.model,
        pairs.variant,
        pairs.label,
        pairs.arm,
        pairs.is_null_arm,
        pairs.compared,
        pairs.n_comparisons,
        pairs.layer,
        pairs.position,
        pairs.agreement,
        judged.bound,
        judged.n_nulls,
        judged.p_value,
        case
            when judged.bound is null then 'insufficient_evidence'
            when pairs.agreement > judged.bound then 'readable'
            else 'like_a_null'
        end as verdict,
        pairs.tokens,
    from pairs
    inner join judged using (organism, model, variant, compared)
)

select * from verdicts
