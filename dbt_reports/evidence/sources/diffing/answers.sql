select * exclude (is_null_arm) from marts.answers
