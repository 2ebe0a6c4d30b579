with

source as (select * from {{ source('raw', 'runs') }}),

renamed as (
    select
        run_id,
        organism,
        model,
        variant,
        corpus,
        method,
        step,
        version,
        settings_id,
        model_revision,
        adapter_hash,
        finished_at,
        compute_s,
        shared_s,
    from source
)

select * from renamed
