select * from marts.figures
