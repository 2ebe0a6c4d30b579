select * from marts.contrast_specificity
