"""Evaluation of stored findings: null scores, hypotheses and grades, per pair and evidence arm.

An evidence arm is one method, or `all` of them together. Nothing here sees a model: everything is read
from the lake and the registry, and written back to the lake under the arm's name.
"""

from collections.abc import Mapping, Sequence
from functools import cache

import pyarrow as pa
import pyarrow.compute as pc

from diffing_core import graders
from diffing_core.agents import calibration, hypothesis, offline
from diffing_core.agents.calibration import CALIBRATION, Decision
from diffing_core.agents.hypothesis import HYPOTHESES, HYPOTHESIS_SCORES, INVESTIGATOR
from diffing_core.agents.offline import Candidate, Investigation
from diffing_core.agents.words import Background
from diffing_core.corpus import read_texts
from diffing_core.findings import FINDINGS
from diffing_core.graders import GRADES
from diffing_core.graders.base import Truth
from diffing_core.identity import RunKey
from diffing_core.lake import Lake
from diffing_core.methods import all_methods
from diffing_core.pairs import Pair
from diffing_core.registry import NULL_ARMS, TRAINING, Registry
from diffing_core.runs import RUNS, Cost
from diffing_core.settings import Settings, short_hash
from diffing_core.tables import TableSpec

VERSION = "1"
ALL = "all"
BACKGROUND_TEXTS = 2000
CANDIDATE_ARM = "organism"


class EvaluationSettings(Settings):
    """The offline investigator and grader have no knobs; agents will have theirs."""


def evidence_arms() -> tuple[str, ...]:
    """Every method that shows findings, and all of them together."""
    return (*(name for name, method in all_methods().items() if method.findings is not None), ALL)


def methods_of(arm: str) -> tuple[str, ...]:
    """The methods whose findings an arm may read."""
    return tuple(name for name in evidence_arms() if name != ALL) if arm == ALL else (arm,)


def evidence(pair: Pair, arm: str, lake: Lake) -> pa.Table:
    """Current findings of one pair and arm on all corpora but `training`, which would give the answer away."""
    found = pa.concat_tables([lake.read_current(FINDINGS, pair=pair, method=name) for name in methods_of(arm)])
    return _untaught(found)


def measured(pair: Pair, arm: str, lake: Lake) -> bool:
    """Whether any method of an arm has a finished result on a pair; only then do no findings mean no difference."""
    return any(_untaught(lake.read_current(RUNS, pair=pair, method=name)).num_rows for name in methods_of(arm))


def _untaught(rows: pa.Table) -> pa.Table:
    return rows.filter(pc.not_equal(rows["corpus"], TRAINING))


class Evaluator:
    """Evaluates pairs of one registry against one lake."""

    def __init__(self, registry: Registry, lake: Lake) -> None:
        self.registry = registry
        self.lake = lake
        self._background = cache(self._read_background)
        self._candidates = cache(self._describe_candidates)

    def investigate(self, pair: Pair, arm: str) -> Investigation:
        """The offline investigator's ranking of candidate descriptions; names and paths stay unseen."""
        found = evidence(pair, arm, self.lake)
        return offline.investigate(found, self._candidates(pair.model), self._background(pair.model))

    def calibrate(self, pairs: Sequence[Pair], arms: Sequence[str]) -> int:
        """Stores the evidence scores of the null pairs among `pairs` that have results; returns how many pairs."""
        nulls = [pair for pair in pairs if self._arm(pair) in NULL_ARMS]
        scored = [(pair, arm) for pair in nulls for arm in arms if measured(pair, arm, self.lake)]
        for pair, arm in scored:
            score = self.investigate(pair, arm).evidence_score
            row = calibration.calibration_row(INVESTIGATOR, score, self._arm(pair))
            self._write(pair, arm, "calibration", {CALIBRATION: row})
        return len({pair for pair, _ in scored})

    def hypothesise(self, pair: Pair, arm: str) -> dict[str, object]:
        """Stores and returns the hypothesis on one pair: assert, or abstain below the null threshold."""
        stored = self.lake.read(CALIBRATION, method=arm)
        nulls = [null for null in calibration.null_scores(stored) if self._is_null(null.pair, pair.model)]
        found = self.investigate(pair, arm)
        decision = calibration.decide(found.evidence_score, nulls, pair)
        if not measured(pair, arm, self.lake):
            decision = Decision("insufficient_evidence", decision.n_nulls)
        tables = hypothesis.tables(found, decision)
        self._write(pair, arm, "hypotheses", tables, basis=[decision.threshold, found.scores])
        return tables[HYPOTHESES].to_pylist()[0]

    def grade(self, pair: Pair, arm: str) -> list[dict[str, object]]:
        """Stores and returns the grades of the stored hypotheses on one pair."""
        hypotheses = self.lake.read(HYPOTHESES, pair=pair, method=arm)
        scores = self.lake.read(HYPOTHESIS_SCORES, pair=pair, method=arm)
        truth = self._truth(pair)
        rows = graders.grade(hypotheses, scores, truth)
        self._write(pair, arm, "grades", {GRADES: rows}, basis=vars(truth))
        return rows.to_pylist()

    def _write(
        self, pair: Pair, arm: str, step: str, tables: Mapping[TableSpec, pa.Table], basis: object = None
    ) -> None:
        """Stores one step's rows; the findings read, and what else the rows rest on, are part of their identity."""
        settings = EvaluationSettings()
        read = sorted(set(evidence(pair, arm, self.lake)["run_id"].to_pylist()))
        key = RunKey(
            pair, arm, VERSION, settings.settings_id(), model_revision="", adapter_hash="",
            corpus_hash=short_hash([read, basis]), step=step,
        )  # fmt: skip
        self.lake.write_result(key, tables, settings, Cost())

    def _is_null(self, pair: Pair, model: str) -> bool:
        """Whether a stored null is one still: registered for this base, and in a null arm."""
        return pair.model == model and pair in self.registry.pairs(model) and self._arm(pair) in NULL_ARMS

    def _arm(self, pair: Pair) -> str:
        return self.registry.organism(pair.organism).arm

    def _truth(self, pair: Pair) -> Truth:
        organism = self.registry.organism(pair.organism)
        return Truth(
            organism.name,
            organism.arm,
            organism.rubric or organism.type,
            organism.ground_truth or "",
            organism.key_facts,
            organism.rubric_text,
        )

    def _describe_candidates(self, model: str) -> tuple[Candidate, ...]:
        organisms = sorted({pair.organism for pair in self.registry.pairs(model)})
        described = [self.registry.organism(name) for name in organisms]
        registered = [
            Candidate(each.name, "\n".join([each.description, each.ground_truth or "", *each.key_facts]))
            for each in described
            if each.arm == CANDIDATE_ARM
        ]
        return (*registered, *offline.decoys())

    def _read_background(self, model: str) -> Background:
        texts: list[str] = []
        for spec in map(self.registry.corpus, self.registry.model(model).corpora):
            texts += read_texts(spec, self.registry.place_of(spec, model), BACKGROUND_TEXTS)
        return Background.of(texts or [candidate.text for candidate in self._candidates(model)])
