select * from marts.cost
