select model, method_a, method_b, count(*) as n_pairs, avg(jaccard) as jaccard
from marts.method_agreement
group by model, method_a, method_b
union all
select model, method_b, method_a, count(*), avg(jaccard)
from marts.method_agreement
group by model, method_a, method_b
