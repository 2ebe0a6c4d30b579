select * from marts.freshness
