with

source as (select * from {{ source('raw', 'hypotheses') }}),

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
        verdict,
        description,
        confidence,
        candidate,
        score as candidate_score,
        threshold,
        n_nulls,
        p_value,
        n_findings,
        tokens_used,
        cost_usd,
    from source
)

select * from renamed
