"""The offline investigator: no key, no network, deterministic; reads the table `findings` and nothing else.

Evidence. Findings of text with a positive score (tuned − base) become weighted words: the r-th finding that holds any
content word gives 1 / log2(1 + r), shared equally by these words; a word weighs that times its idf against the
background. Every run (method x corpus) is scaled to length 1 and they are averaged, so each has one vote.

Candidates. A profile holds (1 + log tf) x idf over the candidates x idf against the background, so words that
all descriptions share ("model", "trained") and common words weigh next to nothing.

Score. Cosine of evidence and profile. Words that no candidate knows stay in the evidence's length: a list that
is mostly noise scores low although one word fits. A token that is no known word is a word piece; from four
letters on it counts for the candidates' words that it begins. Identical models have no positive finding and
score exactly 0.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from math import log, log2, sqrt
from typing import Any

import pyarrow as pa
import yaml

from diffing_core.agents.words import Background, clean, stem, stems, surfaces
from diffing_core.errors import EvaluationError

READ = ("run_id", "rank", "kind", "item", "score", "source_table", "source_key")
QUOTED_KINDS = ("text_snippet", "generation")
WORD_KINDS = (
    "token",
    "topic",
    *QUOTED_KINDS,
)  # names of layers and modules are words too, but say nothing of a subject
MAX_RANK = 100  # what a person would read; beyond it the slowly falling weights would drown the top
MIN_PIECE = 4
N_TOPIC_WORDS = 20
N_EXAMPLES = 3
ITEM_CHARS, EXAMPLE_CHARS = 2_000, 160

Vector = dict[str, float]


@dataclass(frozen=True)
class Candidate:
    """One thing that a finetune may have been trained for; only the text is compared."""

    name: str
    text: str


@dataclass(frozen=True)
class Investigation:
    """What the findings of one pair and evidence arm say."""

    scores: Mapping[str, float]
    description: str
    evidence: tuple[str, ...]
    n_findings: int

    @property
    def evidence_score(self) -> float:
        """The best candidate's score."""
        return max(self.scores.values())

    @property
    def candidate(self) -> str | None:
        """Name of the best candidate, if any scored at all."""
        best = min(self.scores, key=lambda name: (-self.scores[name], name))
        return best if self.scores[best] > 0 else None


@dataclass(frozen=True)
class _Sighting:
    """Where a stem was seen first: its written form and the finding."""

    surface: str
    row: Mapping[str, Any]


def investigate(findings: pa.Table, candidates: Sequence[Candidate], background: Background) -> Investigation:
    """Scores every candidate on stored findings (all corpora of one pair and evidence arm).

    Raises:
        EvaluationError: no candidates, or two of one name.
    """
    names = [candidate.name for candidate in candidates]
    if not names or len(set(names)) != len(names):
        raise EvaluationError(f"candidates must be at least one and named differently, found {sorted(names)}")
    rows = _positive(findings)
    sightings = _sightings(rows)
    evidence = _evidence(rows, background)
    matched = _match_pieces(evidence, sightings, candidates, background)
    profiles = _profiles(candidates, background)
    topic = sorted(evidence, key=lambda word: (-evidence[word], word))[:N_TOPIC_WORDS]
    examples = _examples(rows, set(topic))
    shown = [sightings[word].row for word in topic] + examples
    return Investigation(
        scores={name: _cosine(matched, profiles[name]) for name in names},
        description=_describe([sightings[word].surface for word in topic], examples),
        evidence=tuple(dict.fromkeys(map(_reference, shown))),
        n_findings=len(rows),
    )


@cache
def decoys() -> tuple[Candidate, ...]:
    """Finetunes that nobody trained, written like the registered ones."""
    entries = yaml.safe_load((files(__package__) / "decoys.yaml").read_text("utf-8"))
    return tuple(Candidate(name, text) for name, text in entries.items())


def _positive(findings: pa.Table) -> list[dict[str, Any]]:
    """Findings to read, best first; the order never depends on who was compared."""
    rows = [
        row | {"item": clean(row["item"], ITEM_CHARS)}
        for row in findings.select(READ).to_pylist()
        if row["kind"] in WORD_KINDS and row["score"] > 0 and row["rank"] <= MAX_RANK
    ]
    return sorted(rows, key=lambda row: (row["rank"], row["kind"], row["item"]))


def _sightings(rows: Iterable[Mapping[str, Any]]) -> dict[str, _Sighting]:
    seen: dict[str, _Sighting] = {}
    for row in rows:
        for surface in surfaces(row["item"]):
            seen.setdefault(stem(surface), _Sighting(surface, row))
    return seen


def _evidence(rows: Iterable[Mapping[str, Any]], background: Background) -> Vector:
    runs: dict[str, Vector] = defaultdict(lambda: defaultdict(float))
    place: Counter[str] = Counter()
    for row in rows:
        run_id, words = row["run_id"], dict.fromkeys(stems(row["item"]))
        place[run_id] += bool(words)
        for word in words:
            runs[run_id][word] += background.idf(word) / log2(1 + place[run_id]) / len(words)
    total: Vector = defaultdict(float)
    for run in runs.values():
        length = _length(run)
        for word, weight in run.items():
            if weight > 0:
                total[word] += weight / length / len(runs)
    return dict(total)


def _match_pieces(
    evidence: Vector, sightings: Mapping[str, _Sighting], candidates: Sequence[Candidate], background: Background
) -> Vector:
    """The evidence with word pieces replaced by the candidates' words that they begin, in equal parts."""
    known = {surface: stem(surface) for candidate in candidates for surface in surfaces(candidate.text)}
    vocabulary = set(known.values())
    matched: Vector = defaultdict(float)
    for word, weight in evidence.items():
        piece = sightings[word].surface
        is_word = word in vocabulary or word in background.n_with or sightings[word].row["kind"] != "token"
        begun = set() if is_word else {known[full] for full in known if full.startswith(piece)}
        targets = sorted(begun) if begun and len(piece) >= MIN_PIECE else [word]
        for target in targets:
            matched[target] += weight / len(targets)
    return matched


def _profiles(candidates: Sequence[Candidate], background: Background) -> dict[str, Vector]:
    counts = {candidate.name: Counter(stems(candidate.text)) for candidate in candidates}
    n_with = Counter(word for count in counts.values() for word in count)
    return {
        name: {
            word: (1 + log(tf)) * log((1 + len(counts)) / n_with[word]) * background.idf(word)
            for word, tf in count.items()
        }
        for name, count in counts.items()
    }


def _cosine(left: Vector, right: Vector) -> float:
    shared = sum(left[word] * right[word] for word in sorted(left.keys() & right.keys()))
    return min(1.0, shared / (_length(left) * _length(right))) if shared > 0 else 0.0


def _length(vector: Vector) -> float:
    return sqrt(sum(weight * weight for weight in vector.values()))


def _examples(rows: Iterable[Mapping[str, Any]], topic: set[str]) -> list[Mapping[str, Any]]:
    texts = [row for row in rows if row["kind"] in QUOTED_KINDS]
    return [row for row in texts if topic & set(stems(row["item"]))][:N_EXAMPLES]


def _describe(topic: Sequence[str], examples: Sequence[Mapping[str, Any]]) -> str:
    """Plain language from the findings alone, so that no candidate's wording can be handed back as an answer."""
    if not topic:
        return "The findings hold no content word."
    said = f"The tuned model turns to: {', '.join(topic)}."
    quotes = "; ".join(f"“{clean(row['item'], EXAMPLE_CHARS)}”" for row in examples)
    return f"{said} For example: {quotes}." if quotes else said


def _reference(row: Mapping[str, Any]) -> str:
    """JSON that resolves to the row of the typed table behind a finding."""
    key = json.loads(row["source_key"]) | {"run_id": row["run_id"]}
    return json.dumps({"table": row["source_table"], "key": key}, sort_keys=True)
