select * from marts.organism_summary
