with

runs as (select * from {{ ref('stg_runs') }}),

evaluations as (
    select distinct run_id, 'hypothesis' as stage, investigator, '' as grader from {{ ref('stg_hypotheses') }}
    union
    select distinct run_id, 'calibration', investigator, '' from {{ ref('stg_calibration') }}
    where run_id not in (select run_id from {{ ref('stg_hypotheses') }})
    union
    select distinct run_id, 'grade', investigator, grader from {{ ref('stg_grades') }}
    union
    select distinct run_id, 'expression', '', '' from {{ ref('stg_expression') }}
),

-- a run that wrote no evaluation is a method's own result, even if it found nothing to write
staged as (
    select
        runs.*,
        coalesce(evaluations.stage, 'diff') as stage,
        coalesce(evaluations.investigator, '') as investigator,
        coalesce(evaluations.grader, '') as grader,
    from runs
    left join evaluations on runs.run_id = evaluations.run_id
),

latest as (
    select *
    from staged
    qualify row_number() over (
        partition by organism, model, variant, corpus, method, stage, investigator, grader
        order by finished_at desc, run_id
    ) = 1
)

select * from latest
