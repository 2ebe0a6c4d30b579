with

source as (select * from {{ source('raw', 'calibration') }}),

renamed as (
    select
        run_id,
        organism,
        model,
        variant,
        method,
        investigator,
        arm,
        score as candidate_score,
    from source
)

select * from renamed
