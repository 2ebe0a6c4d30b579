with

traces as (select * from {{ ref('stg_readable_traces') }}),

current_runs as (select run_id from {{ ref('int_current_runs') }} where step = 'diff'),

-- what a finetune was taught may be probed and is never evidence; nulls have no such corpus
current_traces as (
    select * from traces where run_id in (select run_id from current_runs) and corpus is distinct from 'training'
),

-- before an answer every chat has the same template, so halves agree there whatever the model
between_halves as (
    select
        organism,
        model,
        variant,
        'halves of a corpus' as compared,
        layer,
        position,
        token_agreement as agreement,
        tokens as shared_tokens,
    from current_traces
    where position is null or position >= 0
),

-- before an answer every chat has the same template; the first tokens of a text are set against the first of an answer: a trace is there whatever the text is
between_corpora as (
    select
        one.organism,
        one.model,
        one.variant,
        'two corpora' as compared,
        one.layer,
        one.position,
        len(list_intersect(one.tokens, other.tokens))
        / greatest(len(list_distinct(list_concat(one.tokens, other.tokens))), 1) as agreement,
        list_intersect(one.tokens, other.tokens) as shared_tokens,
    from current_traces as one
    inner join current_traces as other
        on one.organism = other.organism
        and one.model = other.model
        and one.variant = other.variant
        and one.layer = other.layer
        and one.position is not distinct from other.position
        and one.corpus < other.corpus
    where one.position is null or one.position >= 0
),

agreement as (
    select
        organism,
        model,
        variant,
        compared,
        layer,
        position,
        count(*) as n_comparisons,
        avg(agreement) as agreement,
        list_sort(list_distinct(flatten(list(shared_tokens)))) as tokens,
    from (from between_halves union all by name from between_corpora)
    group by organism, model, variant, compared, layer, position
)

select * from agreement
