with

hypotheses as (select * from {{ ref('stg_hypotheses') }}),

current_runs as (
    select run_id, investigator, finished_at from {{ ref('int_current_runs') }} where step = 'hypotheses'
),

current_hypotheses as (
    select hypotheses.*, current_runs.finished_at
    from hypotheses
    inner join current_runs
        on hypotheses.run_id = current_runs.run_id and hypotheses.investigator = current_runs.investigator
)

select * from current_hypotheses
