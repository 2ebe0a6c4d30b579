with

source as (select * from {{ source('raw', 'organisms') }}),

renamed as (
    select
        organism,
        model,
        variant,
        organism || case when variant = 'default' then '' else ' (' || variant || ')' end as label,
        type,
        arm,
        description,
        kind,
        dilution,
        arm in ('identical', 'benign', 'seed_twin') as is_null_arm,
    from source
)

select * from renamed
