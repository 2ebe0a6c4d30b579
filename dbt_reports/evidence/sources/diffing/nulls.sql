select *, model || ' · ' || investigator || ' · graded by ' || grader as setting
from marts.null_specificity
