with

answers as (select * from {{ ref('answers') }}),

nulls as (
    select
        organism,
        model,
        variant,
        label,
        corpus,
        arm,
        method,
        investigator,
        repeat,
        grader,
        verdict,
        candidate,
        candidate_score,
        threshold,
        margin,
        n_nulls,
        p_value,
        outcome,
        false_positive,
    from answers
    where is_null_arm
)

select * from nulls
