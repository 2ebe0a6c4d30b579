select * from marts.top_findings
