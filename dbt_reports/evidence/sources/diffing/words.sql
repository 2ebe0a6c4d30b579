select * from marts.method_words
