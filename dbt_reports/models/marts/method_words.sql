with

findings as (select * from {{ ref('int_findings') }}),

-- one item may be found on several corpora: its best rank counts
items as (
    select
        organism,
        model,
        variant,
        method,
        coalesce(word, trim(item)) as shown,
        min(rank) as best_rank,
        max(score) as best_score,
    from findings
    where trim(item) <> '' and corpus is distinct from 'training'
    group by organism, model, variant, method, shown
),

placed as (
    select
        *,
        row_number() over (
            partition by organism, model, variant, method order by best_rank, best_score desc, shown
        ) as place,
    from items
),

listed as (
    select
        organism,
        model,
        variant,
        method,
        count(*) as n_items,
        string_agg(
            case when length(shown) > 40 then left(shown, 39) || '…' else shown end, ' · ' order by place
        ) filter (place <= 10) as top_words,
    from placed
    group by organism, model, variant, method
)

select * from listed
