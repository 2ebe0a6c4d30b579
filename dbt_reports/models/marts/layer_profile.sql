with

current_runs as (select run_id from {{ ref('int_current_runs') }} where step = 'diff'),

norms as (
    select *
    from {{ ref('stg_norm_diff_layers') }}
    where run_id in (select run_id from current_runs)
),

lenses as (
    select *
    from {{ ref('stg_logit_lens_layers') }}
    where run_id in (select run_id from current_runs)
),

-- the two methods may have read different layers
profile as (
    select
        organism,
        model,
        variant,
        corpus,
        layer,
        n_layers,
        (layer + 1) / n_layers as relative_depth,
        norms.mean_relative_norm,
        norms.mean_cosine_distance,
        norms.mean_norm,
        lenses.lens_kl_nats,
    from norms
    full outer join lenses using (organism, model, variant, corpus, layer, n_layers)
)

select * from profile
