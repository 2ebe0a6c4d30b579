select * from marts.candidate_scores
