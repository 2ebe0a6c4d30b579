with

findings as (select * from {{ ref('int_findings') }}),

words as (
    select organism, model, variant, method, word
    from findings
    where word is not null and corpus is distinct from 'training'
    group by organism, model, variant, method, word
    qualify row_number() over (
        partition by organism, model, variant, method order by min(rank), max(score) desc, word
    ) <= 20
),

sizes as (
    select organism, model, variant, method, count(*) as n_words
    from words
    group by organism, model, variant, method
),

pairs_of_methods as (
    select
        left_side.organism,
        left_side.model,
        left_side.variant,
        left_side.method as method_a,
        right_side.method as method_b,
        left_side.n_words as n_words_a,
        right_side.n_words as n_words_b,
    from sizes as left_side
    inner join sizes as right_side using (organism, model, variant)
    where left_side.method < right_side.method
),

shared as (
    select
        left_side.organism,
        left_side.model,
        left_side.variant,
        left_side.method as method_a,
        right_side.method as method_b,
        count(*) as n_shared,
        string_agg(left_side.word, ' · ' order by left_side.word) as shared_words,
    from words as left_side
    inner join words as right_side using (organism, model, variant, word)
    where left_side.method < right_side.method
    group by left_side.organism, left_side.model, left_side.variant, method_a, method_b
),

agreement as (
    select
        pairs_of_methods.*,
        coalesce(shared.n_shared, 0) as n_shared,
        coalesce(shared.n_shared, 0) / (n_words_a + n_words_b - coalesce(shared.n_shared, 0)) as jaccard,
        shared.shared_words,
    from pairs_of_methods
    left join shared using (organism, model, variant, method_a, method_b)
)

select * from agreement
