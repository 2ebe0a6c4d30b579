select * from marts.null_specificity
