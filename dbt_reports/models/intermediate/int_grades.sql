with

grades as (select * from {{ ref('stg_grades') }}),

current_runs as (
    select run_id, investigator, grader, finished_at from {{ ref('int_current_runs') }} where step = 'grades'
),

current_grades as (
    select grades.*, current_runs.finished_at
    from grades
    inner join current_runs
        on grades.run_id = current_runs.run_id
        and grades.investigator = current_runs.investigator
        and grades.grader = current_runs.grader
)

select * from current_grades
