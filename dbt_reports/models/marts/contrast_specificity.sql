with

words as (select * from {{ ref('stg_contrastive_words') }}),

alphas as (select run_id, alpha from {{ ref('stg_contrastive_alphas') }}),

organisms as (select * from {{ ref('stg_organisms') }}),

runs as (
    select run_id, organism, model, variant, method
    from {{ ref('int_current_runs') }}
    where method = 'contrastive_decoding' and step = 'diff'
),

-- a twin is compared with another finetune and the identical pair with itself: neither is a finetune of the base
pairs as (
    select run_id, organism, model, variant, method, label, arm, is_null_arm
    from runs
    inner join organisms using (organism, model, variant)
    where arm not in ('identical', 'seed_twin')
),

raised as (
    select pairs.*, alpha, word, n_docs_plain, n_docs_amplified, z, p_value, q_value
    from words
    inner join pairs using (run_id, organism, model, variant)
    where direction = 'tuned' and against = 'base' and p_value < 0.05
),

-- an organism raises a word if some variant of it does: whoever is specific is so against all of them. One on which this
-- alpha was never run cannot raise anything at it and is no other
others as (select distinct organism, model, alpha from pairs inner join alphas using (run_id)),

raised_by as (select distinct organism, model, alpha, word from raised),

counted as (
    select
        raised.organism,
        raised.model,
        raised.variant,
        raised.method,
        raised.label,
        raised.arm,
        raised.is_null_arm,
        raised.alpha,
        raised.word,
        raised.z,
        raised.p_value,
        raised.q_value,
        raised.n_docs_plain,
        raised.n_docs_amplified,
        count(others.organism) as n_others,
        count(raised_by.organism) as n_others_raising,
        string_agg(raised_by.organism, ', ' order by raised_by.organism) as others_raising,
    from raised
    left join others
        on raised.model = others.model and raised.alpha = others.alpha and raised.organism <> others.organism
    left join raised_by
        on others.organism = raised_by.organism
        and others.model = raised_by.model
        and others.alpha = raised_by.alpha
        and raised.word = raised_by.word
    group by all
),

scored as (
    select *, {{ exact_rate('(n_others - n_others_raising)', 'n_others', 'specificity') }}
    from counted
)

select * from scored
