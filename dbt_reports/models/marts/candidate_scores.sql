with

scores as (select * from {{ ref('stg_hypothesis_scores') }}),

current_runs as (select distinct run_id, investigator from {{ ref('int_hypotheses') }}),

ranking as (
    select
        scores.organism,
        scores.model,
        scores.variant,
        scores.corpus,
        scores.method,
        scores.investigator,
        scores.repeat,
        scores.candidate,
        scores.candidate_rank,
        scores.candidate_score,
        scores.posterior,
    from scores
    inner join current_runs
        on scores.run_id = current_runs.run_id and scores.investigator = current_runs.investigator
)

select * from ranking
