select * from marts.layer_profile
