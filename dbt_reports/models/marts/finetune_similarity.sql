with

peers as (select * from {{ ref('stg_task_vectors_peers') }} where cosine is not null),

current_runs as (select run_id, finished_at from {{ ref('int_current_runs') }} where step = 'diff'),

organisms as (select organism, model, variant, label, arm from {{ ref('stg_organisms') }}),

-- each pair of finetunes is met from both sides, and from one alone until the other is run again
met as (
    select
        *,
        (organism, variant) < (peer_organism, peer_variant) as is_first,
        if(is_first, organism, peer_organism) as organism_a,
        if(is_first, variant, peer_variant) as variant_a,
        if(is_first, norm, peer_norm) as norm_a,
        if(is_first, peer_organism, organism) as organism_b,
        if(is_first, peer_variant, variant) as variant_b,
        if(is_first, peer_norm, norm) as norm_b,
    from peers
    inner join current_runs using (run_id)
),

newest as (
    select *
    from met
    qualify row_number() over (
        partition by model, organism_a, variant_a, organism_b, variant_b
        order by finished_at desc, run_id
    ) = 1
),

similarity as (
    select
        newest.model,
        organism_a,
        variant_a,
        a.label as label_a,
        a.arm as arm_a,
        organism_b,
        variant_b,
        b.label as label_b,
        b.arm as arm_b,
        case relation when 'other' then 'different' when 'variant' then 'variants' else 'twins' end as relation,
        cosine,
        1 - abs(cosine) as orthogonality,
        left_overlap,
        left_expected,
        right_overlap,
        right_expected,
        norm_a,
        norm_b,
        n_tensors,
        finished_at,
    from newest
    inner join organisms as a
        on newest.model = a.model and organism_a = a.organism and variant_a = a.variant
    inner join organisms as b
        on newest.model = b.model and organism_b = b.organism and variant_b = b.variant
)

select * from similarity
