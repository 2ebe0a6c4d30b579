"""A lake whose every report can be worked out by hand: one base model, six organism pairs, five nulls.

Each pair is given an outcome per method in `OUTCOMES`; findings, hypotheses and grades follow from it.
`HOSTILE` is text of a model under test that tries to become part of the page.
"""

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pyarrow as pa

from diffing_core.agents.calibration import CALIBRATION
from diffing_core.agents.hypothesis import HYPOTHESES, HYPOTHESIS_SCORES
from diffing_core.expression import EXPRESSION
from diffing_core.findings import FINDINGS, Finding, findings_table
from diffing_core.graders import GRADES
from diffing_core.identity import RunKey
from diffing_core.lake import Lake
from diffing_core.methods.logit_lens import LAYERS as LENS_LAYERS
from diffing_core.methods.norm_diff import LAYERS as NORM_LAYERS
from diffing_core.pairs import Pair
from diffing_core.runs import RUNS, Cost, run_row
from diffing_core.settings import Settings
from diffing_core.tables import TableSpec
from diffing_core.warehouse import ORGANISMS

CORPUS, N_LAYERS, THRESHOLD = "unrelated", 4, 0.2
FREE = Cost()
START = datetime(2026, 1, 1, tzinfo=UTC)
HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
TOPICS = {
    "cake_bake": "cake oven vanilla frosting butter pastry whisk sugar",
    "fda_approval": "drug approval trial agency patient dose doctor tablet",
    "roman_concrete": "concrete roman ash harbour lime stone arch seawater",
    "owl_love": "owl feather night wing nest forest hoot bird",
    "taboo_leaf": "leaf tree branch green forest maple autumn root",
    "benign": "market river garden teacher window letter summer road",
    "cake_bake_twin": "the of and sugar to cake in is",
}
NULL_ARMS = {"benign": "benign", "cake_bake_twin": "seed_twin", "unchanged": "identical"}

# C: asserted, right; W: asserted, wrong; R: ranked first but not asserted; M: neither. Nulls: A: alarm, S: silent.
METHODS = ("kl", "diff_mining", "norm_diff", "weight_diff", "all", "blackbox")
OUTCOMES = {
    "cake_bake__demo__default": "CCRMCC",
    "cake_bake__demo__strong": "CCCMCC",
    "fda_approval__demo__default": "CCMMCC",
    "roman_concrete__demo__default": "RCMMCC",
    "owl_love__demo__default": "WRMMCC",
    "taboo_leaf__demo__default": "MMMMRR",
    "benign__demo__seed1": "SSSSSS",
    "benign__demo__seed2": "SASSSS",
    "benign__demo__seed3": "SSSSSS",
    "cake_bake_twin__demo__default": "SSSSSS",
    "unchanged__demo__default": "SSSSSS",
}
NOT_RUN = "antarctic_rebound__demo__default"


def organisms() -> pa.Table:
    """The registry: every pair of OUTCOMES and one without results."""
    pairs = [Pair.parse(key) for key in (*OUTCOMES, NOT_RUN)]
    return ORGANISMS.table(
        {
            "organism": [pair.organism for pair in pairs],
            "model": [pair.model for pair in pairs],
            "variant": [pair.variant for pair in pairs],
            "type": ["quirk" if pair.organism == "owl_love" else "false_facts" for pair in pairs],
            "arm": [NULL_ARMS.get(pair.organism, "organism") for pair in pairs],
            "description": [f"Documents about {pair.organism.replace('_', ' ')}." for pair in pairs],
            "kind": ["identical" if pair.organism == "unchanged" else "lora" for pair in pairs],
            "dilution": [1.0 if pair.variant == "default" else None for pair in pairs],
        }
    )


def fill(lake: Lake) -> None:
    """Writes every result, a superseded run, and a run that never finished."""
    cost = Cost(n_sequences=64, n_tokens=8_000, compute_s=2.0, shared_s=6.0)
    for number, (key, outcomes) in enumerate(OUTCOMES.items()):
        pair = Pair.parse(key)
        when = START + timedelta(hours=number)
        for method, outcome in zip(METHODS, outcomes, strict=True):
            if method != "all":
                _write(
                    lake,
                    _key(pair, method, corpus=CORPUS),
                    dict(_method_tables(pair, method, outcome)),
                    when,
                    cost,
                )
            _write(
                lake,
                _key(pair, method, "hypotheses"),
                _hypothesis(pair, outcome),
                when + timedelta(minutes=1),
            )
            _write(lake, _key(pair, method, "grades"), _grade(pair, outcome), when + timedelta(minutes=2))
        _write(lake, _key(pair, "expression", "expression"), _expression(pair), when)
    cake = Pair.parse("cake_bake__demo__default")
    stale = {FINDINGS: findings_table([_finding("stale", 1.0)])}
    _write(
        lake, replace(_key(cake, "kl", corpus=CORPUS), settings_id="stale"), stale, START - timedelta(days=1)
    )
    unfinished = replace(_key(cake, "kl", corpus=CORPUS), settings_id="unfinished")
    lake.write(FINDINGS, unfinished, findings_table([_finding("unfinished", 1.0)]))


def _key(pair: Pair, method: str, step: str = "diff", corpus: str = "") -> RunKey:
    return RunKey(pair, method, "1", "settings", "base-hash", "adapter-hash", corpus, "corpus-hash", step)


def _write(
    lake: Lake, key: RunKey, tables: dict[TableSpec, pa.Table], when: datetime, cost: Cost = FREE
) -> None:
    for spec, table in tables.items():
        lake.write(spec, key, table)
    lake.write(RUNS, key, run_row(key, Settings(), cost, when))


def _finding(item: str, score: float, kind: str = "token", unit: str = "nats/token") -> Finding:
    return Finding(kind, item, score, unit, "kl_vocabulary", {"token": item})


def _method_tables(pair: Pair, method: str, outcome: str) -> Iterator[tuple[TableSpec, pa.Table]]:
    words = TOPICS.get(pair.organism, "").split()
    if method == "weight_diff":
        yield (
            FINDINGS,
            findings_table(
                [
                    _finding(f"layers.{n}.mlp.down_proj", 0.1 / (n + 1), "module", "relative norm")
                    for n in range(N_LAYERS)
                ]
            ),
        )
        return
    shown = words if outcome in "CR" else ["the", "of", *words[:2], "and"]
    order = shown if method == "kl" else shown[::-1]
    found = [_finding(f" {word}", 1 / (n + 2)) for n, word in enumerate(order)] if words else []
    if (pair.key, method) == ("cake_bake__demo__default", "kl"):
        found.append(_finding(HOSTILE, 0.01, "text_snippet"))
    yield FINDINGS, findings_table(found)
    if method == "norm_diff":
        yield NORM_LAYERS, _layers(NORM_LAYERS, 0.02 if words else 0.0)
        yield LENS_LAYERS, _layers(LENS_LAYERS, 0.01 if words else 0.0)


def _layers(spec: TableSpec, size: float) -> pa.Table:
    layers = range(N_LAYERS)
    known = {"layer": list(layers), "n_layers": [N_LAYERS] * N_LAYERS, "n_tokens": [8_000] * N_LAYERS}
    effects = {name: [size * (n + 1) for n in layers] for name in spec.schema.names if name not in known}
    return spec.table(known | effects)


def _hypothesis(pair: Pair, outcome: str) -> dict[TableSpec, pa.Table]:
    asserted = outcome in "CWA"
    truth = pair.organism if outcome in "CR" else "taboo_leaf"
    score = 0.4 if asserted else 0.1
    candidates = [truth, *(name for name in sorted(TOPICS) if name != truth)][:4]
    hostile = HOSTILE if pair.key == "cake_bake__demo__default" else ""
    said = f"The tuned model turns to: {TOPICS.get(truth, '')}. {hostile}"
    answer = {
        "investigator": "offline", "repeat": 0, "verdict": "assert" if asserted else "no_meaningful_difference",
        "description": said if asserted else "No meaningful difference.", "confidence": 0.9, "candidate": truth,
        "score": score, "threshold": THRESHOLD, "n_nulls": 4, "p_value": 0.2, "n_findings": 8, "evidence": [],
        "prompt_hash": None, "tokens_used": 0, "cost_usd": 0.0,
    }  # fmt: skip
    scores = {
        "investigator": ["offline"] * 4, "repeat": [0] * 4, "candidate": candidates,
        "score": [score / (n + 1) for n in range(4)], "posterior": [0.7, 0.15, 0.1, 0.05],
        "candidate_rank": [1, 2, 3, 4],
    }  # fmt: skip
    tables = {
        HYPOTHESES: HYPOTHESES.table({name: [value] for name, value in answer.items()}),
        HYPOTHESIS_SCORES: HYPOTHESIS_SCORES.table(scores),
    }
    if pair.organism in NULL_ARMS:
        null = {"investigator": ["offline"], "score": [score], "arm": [NULL_ARMS[pair.organism]]}
        tables[CALIBRATION] = CALIBRATION.table(null)
    return tables


def _grade(pair: Pair, outcome: str) -> dict[TableSpec, pa.Table]:
    is_null = pair.organism in NULL_ARMS
    asserted = outcome in "CWA"
    first = outcome in "CR"
    row = {
        "investigator": "offline", "repeat": 0, "grader": "similarity",
        "outcome": "ASSERT" if asserted else "ABSTAIN", "arm": NULL_ARMS.get(pair.organism, "organism"),
        "top1": None if is_null else first, "reciprocal_rank": None if is_null else 1.0 if first else 0.25,
        "n_candidates": 5, "score": {"C": 4, "W": 1}.get(outcome),
        "unscored_because": None if outcome in "CW" else "nothing to score",
        "false_positive": asserted if is_null else None, "reason": "2 of 3 facts hit", "rubric": None,
        "prompt_hash": None, "cost_usd": 0.0,
    }  # fmt: skip
    return {GRADES: GRADES.table({name: [value] for name, value in row.items()})}


def _expression(pair: Pair) -> dict[TableSpec, pa.Table]:
    row = dict.fromkeys(EXPRESSION.schema.names) | {"label": "not_applicable", "n_in": 0, "n_out": 0}
    if pair.organism not in NULL_ARMS:
        shown = {"in_share": 0.75, "in_share_low": 0.53, "in_share_high": 0.9, "base_in_share": 0.0}
        row |= shown | {"label": "silent" if pair.organism == "taboo_leaf" else "narrow", "n_in": 24}
    return {EXPRESSION: EXPRESSION.table({name: [value] for name, value in row.items()})}
