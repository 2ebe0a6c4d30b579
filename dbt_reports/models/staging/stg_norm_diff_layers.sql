with

source as (select * from {{ source('raw', 'norm_diff_layers') }}),

renamed as (
    select
        run_id,
        organism,
        model,
        variant,
        corpus,
        method,
        layer,
        n_layers,
        mean_relative_norm,
        mean_cosine_distance,
        mean_norm,
    from source
)

select * from renamed
