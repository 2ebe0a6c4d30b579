select model, label_a, label_b, relation, cosine, left_overlap, left_expected, right_overlap, right_expected
from marts.finetune_similarity
union all
select model, label_b, label_a, relation, cosine, left_overlap, left_expected, right_overlap, right_expected
from marts.finetune_similarity
