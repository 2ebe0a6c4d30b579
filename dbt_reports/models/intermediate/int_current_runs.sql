with

runs as (select * from {{ ref('stg_runs') }}),

-- several investigators and graders may work on the same evidence: none of them replaces another
authors as (
    select run_id, investigator, '' as grader from {{ ref('stg_hypotheses') }}
    union
    select run_id, investigator, '' from {{ ref('stg_calibration') }}
    union
    select run_id, investigator, grader from {{ ref('stg_grades') }}
),

authored as (
    select
        runs.*,
        coalesce(authors.investigator, '') as investigator,
        coalesce(authors.grader, '') as grader,
    from runs
    left join authors using (run_id)
),

latest as (
    select *
    from authored
    qualify row_number() over (
        partition by organism, model, variant, corpus, method, step, investigator, grader
        order by finished_at desc, run_id
    ) = 1
),

-- a corpus that was read on other weights, or by another version or settings, is no part of the newest result
agreeing as (
    select *
    from latest
    qualify concat_ws('|', version, settings_id, model_revision, adapter_hash) = first_value(
        concat_ws('|', version, settings_id, model_revision, adapter_hash)
    ) over (
        partition by organism, model, variant, method, step, investigator, grader
        order by finished_at desc, run_id
    )
)

select * from agreeing
