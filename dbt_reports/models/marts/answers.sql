with

hypotheses as (select * from {{ ref('int_hypotheses') }}),

grades as (select * from {{ ref('int_grades') }}),

organisms as (select * from {{ ref('stg_organisms') }}),

graded as (
    select
        hypotheses.organism,
        hypotheses.model,
        hypotheses.variant,
        hypotheses.corpus,
        organisms.label,
        organisms.arm,
        organisms.is_null_arm,
        hypotheses.method,
        hypotheses.investigator,
        hypotheses.repeat,
        coalesce(grades.grader, 'not graded') as grader,
        hypotheses.verdict,
        hypotheses.description,
        hypotheses.confidence,
        hypotheses.candidate,
        hypotheses.candidate_score,
        hypotheses.threshold,
        hypotheses.candidate_score - hypotheses.threshold as margin,
        hypotheses.n_nulls,
        hypotheses.p_value,
        hypotheses.n_findings,
        grades.outcome,
        grades.top1,
        grades.reciprocal_rank,
        grades.n_candidates,
        grades.rubric_score,
        grades.unscored_because,
        grades.false_positive,
        grades.reason,
    from hypotheses
    inner join organisms using (organism, model, variant)
    left join grades
        on hypotheses.organism = grades.organism
        and hypotheses.model = grades.model
        and hypotheses.variant = grades.variant
        and hypotheses.corpus = grades.corpus
        and hypotheses.method = grades.method
        and hypotheses.investigator = grades.investigator
        and hypotheses.repeat = grades.repeat
        and hypotheses.finished_at <= grades.finished_at
)

select * from graded
