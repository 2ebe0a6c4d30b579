with

source as (select * from {{ source('raw', 'grades') }}),

renamed as (
    select
        run_id,
        organism,
        model,
        variant,
        corpus,
        method,
        investigator,
        repeat,
        grader,
        outcome,
        top1,
        reciprocal_rank,
        n_candidates,
        score as rubric_score,
        unscored_because,
        false_positive,
        reason,
        cost_usd,
    from source
)

select * from renamed
