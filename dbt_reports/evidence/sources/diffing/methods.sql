select *, model || ' · ' || investigator || ' · graded by ' || grader as setting
from marts.method_effectiveness
