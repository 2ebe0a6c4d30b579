with

source as (select * from {{ source('raw', 'logit_lens_layers') }}),

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
        kl_nats as lens_kl_nats,
    from source
)

select * from renamed
