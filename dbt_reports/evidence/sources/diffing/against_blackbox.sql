select *, model || ' · ' || investigator || ' · graded by ' || grader as setting
from marts.against_blackbox
