with

current_runs as (select run_id from {{ ref('int_current_runs') }} where step = 'diff'),

sae_specific as (
    select run_id, layer, count(*) filter (beta_ratio < 0.2) as n_specific
    from {{ ref('stg_sae_diff_latents') }}
    where target = 'difference'
    group by run_id, layer
),

crosscoder_specific as (
    select run_id, layer, count(*) filter (scaling_class in ('tuned_only', 'moved')) as n_specific
    from {{ ref('stg_crosscoder_latents') }}
    group by run_id, layer
),

top_tokens as (
    select run_id, layer, string_agg(trim(token), ' · ' order by place) as top_tokens
    from {{ ref('int_dictionary_tokens') }}
    where place <= 10
    group by run_id, layer
),

crosscoder_removed as (
    select * from {{ ref('stg_crosscoder_causal') }} where latents = 'listed' and action = 'add'
),

itda_removed as (
    select * from {{ ref('stg_itda_ablations') }} where ablated = 'new' and how = 'turned_back'
),

measured as (
    select
        fits.* exclude (target, n_latents),
        n_latents as n_atoms,
        n_specific,
        null::double as tuned_fvu,
        null::double as kl_removed,
        null::double as kl_removed_low,
        null::double as kl_removed_high,
    from {{ ref('stg_sae_diff_fit') }} as fits
    left join sae_specific using (run_id, layer)
    where target = 'difference'
    union all by name
    select
        fits.* exclude (part, n_latents),
        n_latents as n_atoms,
        n_specific,
        kl_share as kl_removed,
        kl_share_low as kl_removed_low,
        kl_share_high as kl_removed_high,
    from {{ ref('stg_crosscoder_fits') }} as fits
    left join crosscoder_specific using (run_id, layer)
    left join crosscoder_removed using (run_id, layer)
    where part = 'held_out'
    union all by name
    select
        layers.* exclude (new_atoms),
        new_atoms as n_specific,
        removed as kl_removed,
        removed_low as kl_removed_low,
        removed_high as kl_removed_high,
    from {{ ref('stg_itda_layers') }} as layers
    left join itda_removed using (run_id, layer)
),

side_by_side as (
    select
        organism,
        model,
        variant,
        corpus,
        layer,
        method,
        n_atoms,
        n_specific,
        tuned_fvu,
        difference_fvu,
        l0,
        kl_removed,
        kl_removed_low,
        kl_removed_high,
        top_tokens,
    from measured
    inner join current_runs using (run_id)
    left join top_tokens using (run_id, layer)
)

select * from side_by_side
