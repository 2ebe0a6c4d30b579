select * from marts.dictionary_side_by_side
