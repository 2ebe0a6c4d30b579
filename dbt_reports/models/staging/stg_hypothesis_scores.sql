with

source as (select * from {{ source('raw', 'hypothesis_scores') }}),

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
        candidate,
        candidate_rank,
        score as candidate_score,
        posterior,
    from source
)

select * from renamed
