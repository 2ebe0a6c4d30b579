with

source as (select * from {{ source('raw', 'task_vectors_peers') }}),

renamed as (
    select
        run_id,
        organism,
        model,
        variant,
        peer_organism,
        peer_variant,
        relation,
        problem,
        n_tensors,
        norm,
        peer_norm,
        cosine,
        left_overlap,
        left_expected,
        right_overlap,
        right_expected,
    from source
)

select * from renamed
