"""Every table there is: what the lake seeds, the warehouse loads, dbt reads and the documentation lists."""

from functools import cache

from diffing_core.agents.calibration import CALIBRATION
from diffing_core.agents.hypothesis import HYPOTHESES, HYPOTHESIS_SCORES
from diffing_core.expression import EXPRESSION
from diffing_core.findings import FINDINGS
from diffing_core.graders import GRADES
from diffing_core.methods import all_methods
from diffing_core.runs import RUNS
from diffing_core.tables import TableSpec


@cache
def all_tables() -> dict[str, TableSpec]:
    """Table specs by name: those common to all methods first, then each method's own."""
    common = (RUNS, FINDINGS, EXPRESSION, CALIBRATION, HYPOTHESES, HYPOTHESIS_SCORES, GRADES)
    own = (spec for method in all_methods().values() for spec in method.tables)
    return {spec.name: spec for spec in (*common, *own)}
