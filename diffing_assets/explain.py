"""The tables that the command line prints: queries on the published warehouse, worded for a terminal."""

from typing import Any

from diffing_core.errors import StorageError
from diffing_core.settings import diffing_home
from diffing_core.warehouse import FILE

Printed = tuple[list[str], list[list[Any]]]

EFFECTIVENESS = """
select
    method,
    n_top1 || '/' || n_ranked || format(' [{:.2f}, {:.2f}]', top1_low, top1_high) as "top-1",
    format('{:.2f} [{:.2f}, {:.2f}] n={}', mrr, mrr_low, mrr_high, n_reciprocal_ranks) as "MRR",
    n_detected || '/' || n_ranked || format(' [{:.2f}, {:.2f}]', detection_low, detection_high) as "identified",
    n_variants_detected || '/' || n_variants as "variants",
    n_only_method || ' : ' || n_only_blackbox || format(' (p {:.2f})', p_holm) as "against blackbox",
    n_false_positives || '/' || n_nulls || format(' [{:.2f}, {:.2f}]', false_positive_low, false_positive_high)
        as "false alarms on nulls",
from marts.method_effectiveness
left join marts.against_blackbox using (model, method, investigator, grader)
where model = ?
order by n_detected desc, n_top1 desc, method
"""
READING = (
    "top-1, MRR, identified: one variant per organism, with exact 95 % intervals (MRR: Wilson's); variants: identified, of all\n"
    "against blackbox: organisms identified by this method alone : by blackbox alone (McNemar's exact p, Holm-adjusted)"
)

OUTCOMES = {
    "identified": "●",
    "ranked first, not claimed": "○",
    "silent": "·",
    "described": "◐",
    "wrong claim": "✗",
    "rightly silent": "·",
    "false alarm": "✗",
    "undecided": "?",
}
LEGEND = (
    "● identified   ○ ranked first, but no stronger than on nulls   · silent   ✗ wrong claim or false alarm   "
    "? too few nulls to decide"
)
BY_ORGANISM = """
select label as organism, arm, method, outcome from marts.outcomes
where model = ? order by arm <> 'organism', organism, method
"""

EXPLANATION = """
select
    g.method, h.verdict, h.candidate as "best candidate", round(h.score, 3) as score,
    round(h.threshold, 3) as threshold, g.top1 as "is right", g.score as grade, h.description
from raw.grades g
join raw.hypotheses h using (organism, model, variant, method, investigator, repeat)
where organism = ? and model = ? and variant = ?
order by g.method
"""

FINDINGS = """
select method, string_agg(item, ' | ' order by rank, corpus)
from marts.top_findings
where organism = ? and model = ? and variant = ? and rank <= ?
group by method
"""


def effectiveness(model: str) -> Printed:
    """One row per method: successes by organism, by variant and against blackbox, false alarms; rates with their n."""
    return _query(EFFECTIVENESS, [model])


def method_by_organism(model: str) -> Printed:
    """One row per pair, one column per method: what became of it, as a sign of LEGEND."""
    rows = _query(BY_ORGANISM, [model])[1]
    methods = list(dict.fromkeys(method for *_, method, _ in rows))
    table: dict[tuple[str, str], dict[str, str]] = {}
    for organism, arm, method, outcome in rows:
        table.setdefault((organism, arm), {})[method] = OUTCOMES[outcome]
    return ["finetune", "arm", *methods], [[*pair, *(cells.get(m) for m in methods)] for pair, cells in table.items()]


def explanation(organism: str, model: str, variant: str, shown: int) -> Printed:
    """One row per evidence arm of a pair, with the best findings of each method."""
    columns, rows = _query(EXPLANATION, [organism, model, variant])
    if not rows:
        raise StorageError(
            f"no graded result for {organism} on {model} ({variant}) in the published warehouse; "
            "materialize the pair and the reports, or see `diffing organisms list`"
        )
    found = dict(_query(FINDINGS, [organism, model, variant, shown])[1])
    return [*columns, "findings"], [[*row, found.get(row[0], "")] for row in rows]


def _query(sql: str, parameters: list[Any]) -> Printed:
    import duckdb

    path = diffing_home() / FILE
    if not path.exists():
        raise StorageError(f"{path} does not exist yet; run `diffing demo` or materialize the reports")
    with duckdb.connect(path, read_only=True) as connection:
        result = connection.execute(sql, parameters)
        return [column[0] for column in result.description], [list(row) for row in result.fetchall()]
