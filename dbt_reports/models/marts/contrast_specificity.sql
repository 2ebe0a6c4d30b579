with

words as (select * from {{ ref('stg_contrastive_words') }}),

alphas as (select run_id, alpha, has_control from {{ ref('stg_contrastive_alphas') }}),

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
    select pairs.*, has_control, alpha, word, n_docs_plain, n_docs_amplified, z, p_value, q_value
    from words
    inner join pairs using (run_id, organism, model, variant)
    inner join alphas using (run_id, alpha)
    where direction = 'tuned' and against = 'base' and p_value < 0.05
),

-- the null control of a run: the base with the change turned at random, amplified as far; run at one alpha
controls as (
    select model, alpha, count(distinct organism) as n_controls
    from pairs inner join alphas using (run_id)
    where has_control
    group by all
),

said_by_controls as (
    select run_id, organism, model, alpha, word
    from words inner join pairs using (run_id, organism, model, variant)
    where direction = 'random' and against = 'base' and p_value < 0.05
),

raised_by_controls as (
    select model, alpha, word, count(distinct organism) as n_controls_raising
    from said_by_controls
    group by all
),

-- an organism raises a word if some variant of it does: whoever is specific is so against all of them. One on which this
-- alpha was never run cannot raise anything at it and is no other
others as (select distinct organism, model, alpha from pairs inner join alphas using (run_id)),

raised_by as (select distinct organism, model, alpha, word from raised),

counted as (
    select
        raised.*,
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

controlled as (
    select
        counted.* exclude (run_id, has_control),
        case when has_control then said_by_controls.word is not null end as is_raised_by_control,
        coalesce(n_controls, 0) as n_controls,
        case when n_controls > 0 then coalesce(n_controls_raising, 0) end as n_controls_raising,
    from counted
    left join controls using (model, alpha)
    left join raised_by_controls using (model, alpha, word)
    left join said_by_controls
        on counted.run_id = said_by_controls.run_id
        and counted.alpha = said_by_controls.alpha
        and counted.word = said_by_controls.word
),

scored as (
    select *, {{ exact_rate('(n_others - n_others_raising)', 'n_others', 'specificity') }}
    from controlled
)

select * from scored
