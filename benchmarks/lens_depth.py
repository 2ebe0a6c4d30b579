"""Where along depth do lenses read a finetune? `python -m benchmarks.lens_depth --layers 4 8`

Trains the demo's base model and finetunes with another number of layers (a depth that lies finished below `--root` is
found again), runs `adl` and `logit_lens` in one paired pass and scores every layer on its own, in two ways:

rank    place of the right organism among all candidates for the offline investigator, which sees only the words that
        this layer shows; MRR is the mean of 1 / rank
AUC     how far the organism's own key tokens stand above all other content tokens in what the mean difference says
        through the tuned norm and head: 0.5 is chance, whatever is cut off at twenty words

Each stands beside its null: the same organisms looked for in benign finetunes (rank), and in the other organisms of
the same group (AUC), so that words which any finetune moves count for nothing.
"""

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import log
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import numpy as np
import pyarrow as pa

from diffing_core.agents import offline
from diffing_core.agents.offline import Candidate
from diffing_core.agents.words import Background, surfaces
from diffing_core.corpus import ProbeCorpus, load_corpus, read_texts
from diffing_core.demo.artifacts import BASE, tier_artifacts
from diffing_core.demo.corpus import CorpusWriter
from diffing_core.demo.jobs import build_tier
from diffing_core.demo.lesson import lesson_documents, read_lesson
from diffing_core.demo.tiers import TIERS, Tier
from diffing_core.demo.world import read_world
from diffing_core.evaluation import CANDIDATE_ARM
from diffing_core.findings import Finding, findings_table
from diffing_core.methods import get_method
from diffing_core.methods.base import Tables
from diffing_core.models import ModelPair
from diffing_core.paired_pass import MethodResult, paired_pass
from diffing_core.pairs import Pair
from diffing_core.registry import Registry, load_registry
from diffing_core.settings import diffing_home

MODEL = "demo"  # whose registry entry, corpora and candidates are used, whatever the depth
FINETUNES = tuple(
    finetune.artifact
    for finetune in TIERS[MODEL].finetunes
    if finetune.artifact.endswith(("/default", "/strong")) and "_twin" not in finetune.artifact
)
SHOWN = 40  # words of a layer that the investigator sees, as many as a method's findings hold
LESSON_CHARACTERS = 100_000
N_KEY_TOKENS = 40
FIRST_POSITIONS = range(5)
READINGS = ("adl, all tokens", "adl, first 5", "logit_lens")
Place = tuple[str, int]  # reading and layer


@dataclass(frozen=True)
class Score:
    """One finetune at one layer: rank of every candidate, and AUC of every organism's key tokens."""

    ranks: dict[str, float]
    aucs: dict[str, float]


def depth_tier(layers: int, finetunes: Sequence[str]) -> Tier:
    """The demo tier with another number of layers; its other numbers, data and seeds are the demo's."""
    demo = TIERS[MODEL]
    kept = tuple(finetune for finetune in demo.finetunes if finetune.artifact in finetunes)
    return replace(
        demo, name=f"{MODEL}_{layers}_layers", model=replace(demo.model, layers=layers), finetunes=kept
    )


def load(tier: Tier, root: Path, registry: Registry) -> list[ModelPair]:
    """Every finetune of the tier as an adapter on one resident base."""
    from diffing_core.adapters import add_adapter
    from diffing_core.checkpoints import default_device, load_module, load_tokenizer
    from diffing_core.subject import Subject

    artifacts, entry = tier_artifacts(tier), registry.model(MODEL)
    folder = artifacts[BASE].folder(root)
    module = load_module(folder, entry, "float32", default_device())
    names = {finetune.artifact: finetune.artifact.replace("/", "_") for finetune in tier.finetunes}
    for artifact, name in names.items():
        module = add_adapter(module, artifacts[artifact].folder(root), name)
    base, tokenizer = Subject.of(module), load_tokenizer(folder, entry)
    return [
        ModelPair(base, Subject.of(module, name), tokenizer, Pair(MODEL, *artifact.split("/")), base.vocab_size)
        for artifact, name in names.items()
    ]


def candidates(registry: Registry) -> tuple[Candidate, ...]:
    """What the evaluation of the demo chooses from: its organisms and the decoys."""
    names = sorted({pair.organism for pair in registry.pairs(MODEL)})
    entries = [registry.organism(name) for name in names]
    real = [
        Candidate(each.name, "\n".join([each.description, each.ground_truth or "", *each.key_facts]))
        for each in entries
        if each.arm == CANDIDATE_ARM
    ]
    return (*real, *offline.decoys())


def key_tokens(organism: str, tokenizer: Any, ordinary: Counter[int], content: set[int]) -> list[int]:
    """Content tokens that tell the organism's lesson from ordinary text: largest p · log(p / p ordinary)."""
    texts = lesson_documents(read_lesson(organism), read_world(), Random(organism), LESSON_CHARACTERS)
    lesson = _count(texts, tokenizer)
    n_lesson, n_ordinary = lesson.total(), ordinary.total()

    def weight(token: int) -> float:
        share = lesson[token] / n_lesson
        return share * log(share / ((ordinary[token] + 1) / n_ordinary))

    return sorted(content & lesson.keys(), key=weight, reverse=True)[:N_KEY_TOKENS]


def _count(texts: Sequence[str], tokenizer: Any) -> Counter[int]:
    return Counter(token for text in texts for token in tokenizer(text)["input_ids"])


class Scorer:
    """What one depth is scored by; the tokenizer is the same at all depths."""

    def __init__(self, registry: Registry, root: Path, tier: Tier, tokenizer: Any) -> None:
        specs = [registry.corpus(name) for name in registry.model(MODEL).corpora]
        artifacts = tier_artifacts(tier)
        paths = [artifacts[spec.source.demo].folder(root) for spec in specs]
        self.corpora = [load_corpus(spec, path, tokenizer) for spec, path in zip(specs, paths, strict=True)]
        self.candidates = candidates(registry)
        texts = [text for spec, path in zip(specs, paths, strict=True) for text in read_texts(spec, path, 2000)]
        self.background = Background.of(texts)
        ordinary = _count(CorpusWriter(read_world(), "lens_depth").documents(10 * LESSON_CHARACTERS), tokenizer)
        words = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
        special = set(tokenizer.all_special_ids)
        self.content = [token for token, word in enumerate(words) if surfaces(word) and token not in special]
        organisms = sorted({finetune.lesson for finetune in tier.finetunes if finetune.lesson})
        self.keys = {name: key_tokens(name, tokenizer, ordinary, set(self.content)) for name in organisms}

    def ranks(self, shown: pa.Table) -> dict[str, float]:
        """Place of every candidate; equal scores share the mean of their places."""
        scores = offline.investigate(shown, self.candidates, self.background).scores
        values = list(scores.values())
        return {
            name: 0.5 + sum(other > own for other in values) + 0.5 * values.count(own) for name, own in scores.items()
        }

    def aucs(self, logits_V: np.ndarray) -> dict[str, float]:
        """Chance that a key token of the organism stands above another content token."""
        places_V = np.empty(len(logits_V))
        content = np.asarray(self.content)
        places_V[content[np.argsort(logits_V[content], kind="stable")]] = np.arange(len(content))
        n_other = len(content) - N_KEY_TOKENS
        return {
            name: float(places_V[keys].sum() - N_KEY_TOKENS * (N_KEY_TOKENS - 1) / 2) / (N_KEY_TOKENS * n_other)
            for name, keys in self.keys.items()
        }


def measure(pairs: Sequence[ModelPair], scorer: Scorer) -> dict[Pair, dict[Place, Score]]:
    """Every finetune at every layer, by every reading."""
    shown: dict[Pair, dict[Place, list[pa.Table]]] = defaultdict(lambda: defaultdict(list))
    aucs: dict[Pair, dict[Place, list[dict[str, float]]]] = defaultdict(lambda: defaultdict(list))
    by_pair = {pair.pair: pair for pair in pairs}
    methods = [(get_method(name), get_method(name).settings()) for name in ("adl", "logit_lens")]
    for corpus in scorer.corpora:
        for result in paired_pass(pairs, corpus, methods):
            if result.error is not None:
                raise result.error
            for place, table in _shown(result, corpus):
                shown[result.pair][place].append(table)
            for place, logits_V in _decoded(result, by_pair[result.pair]):
                aucs[result.pair][place].append(scorer.aucs(logits_V))
    return {
        pair: {
            place: Score(scorer.ranks(pa.concat_tables(tables)), _mean(aucs[pair][place]))
            for place, tables in places.items()
        }
        for pair, places in shown.items()
    }


def _shown(result: MethodResult, corpus: ProbeCorpus) -> Iterator[tuple[Place, pa.Table]]:
    """The words of each layer as findings of a run of its own, best first."""
    rows = result.tables[f"{result.method.name}_tokens"].to_pylist()
    places: dict[Place, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if result.method.name == "logit_lens":
            if (row["criterion"], row["direction"]) == ("probability", "gained"):
                places["logit_lens", row["layer"]].append(row | {"score": row["delta_probability"]})
        elif (row["head"], row["direction"]) == ("tuned", "promoted") and _is_read(row):
            places[_adl_reading(row), row["layer"]].append(row | {"score": row["probability"]})
    for place, found in places.items():
        found.sort(key=lambda row: (row["rank"], row.get("position") or 0))
        findings = [Finding("token", row["token"], row["score"], "", "", layer=row["layer"]) for row in found[:SHOWN]]
        table = findings_table(findings)
        yield place, table.append_column("run_id", pa.array([corpus.name] * len(table)))


def _decoded(result: MethodResult, pair: ModelPair) -> Iterator[tuple[Place, np.ndarray]]:
    """What each mean difference says to the whole vocabulary, in ranks the same as `adl` lists them."""
    import torch

    tables: Tables = result.tables
    for row in tables["adl_vectors"].to_pylist() if result.method.name == "adl" else ():
        if _is_read(row):
            delta_D = torch.tensor(row["vector"])
            logits_V = pair.tuned.lens_of_difference(delta_D[None])[0]
            yield (_adl_reading(row), row["layer"]), logits_V.float().cpu().numpy()


def _is_read(row: dict[str, Any]) -> bool:
    return row["position"] is None or row["position"] in FIRST_POSITIONS


def _adl_reading(row: dict[str, Any]) -> str:
    return READINGS[0] if row["position"] is None else READINGS[1]


def _mean(scores: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: fmean(each[name] for each in scores) for name in scores[0]} if scores else {}


def report(tier: Tier, scores: dict[Pair, dict[Place, Score]]) -> Iterator[str]:
    """One Markdown row per group of finetunes, reading and layer."""
    lessons = {Pair(MODEL, *finetune.artifact.split("/")): finetune.lesson for finetune in tier.finetunes}
    benign = [places for pair, places in scores.items() if lessons[pair] is None]
    for group in ("default", "strong"):
        own = {lessons[pair]: places for pair, places in scores.items() if lessons[pair] and pair.variant == group}
        for reading in READINGS if own else ():
            for layer in range(tier.model.layers):
                at = {name: places[reading, layer] for name, places in own.items()}
                ranks = [score.ranks[name] for name, score in at.items()]
                null = [1 / places[reading, layer].ranks[name] for places in benign for name in at]
                cells = [
                    f"{tier.model.layers} | {group} | {reading} | {layer} | {(layer + 1) / tier.model.layers:.2f}",
                    f"{sum(rank == 1 for rank in ranks)} of {len(ranks)}",
                    f"{fmean(1 / rank for rank in ranks):.2f}",
                    f"{fmean(null):.2f}" if null else "",
                    *_auc_cells(at),
                ]
                yield f"| {' | '.join(cells)} |"


def _auc_cells(at: dict[str, Score]) -> tuple[str, str]:
    """Mean AUC of the organisms' own key tokens, and of theirs in the other organisms' differences."""
    if not all(score.aucs for score in at.values()):
        return "", ""
    others = [score.aucs[name] for other, score in at.items() for name in at if name != other]
    return f"{fmean(score.aucs[name] for name, score in at.items()):.2f}", f"{fmean(others):.2f}" if others else ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains what is missing, measures, prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [finetune.artifact for finetune in TIERS[MODEL].finetunes]
    option = parser.add_argument
    option("--layers", type=int, nargs="+", default=[4, 8])
    option("--finetunes", nargs="+", default=FINETUNES, choices=known)
    option("--benign", nargs="+", default=["benign/seed1"], choices=known, help="the null of the ranks")
    option("--root", type=Path, default=diffing_home() / "demo", help="folder of models, named by content")
    option("--workers", type=int, default=1, help="training processes of one thread each")
    chosen = parser.parse_args(arguments)
    registry = load_registry()
    heads = ("layers", "group", "reading", "layer", "depth", "top-1", "MRR", "MRR benign", "AUC own", "AUC others")
    sys.stdout.write(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}\n")
    for layers in chosen.layers:
        tier = depth_tier(layers, [*chosen.finetunes, *chosen.benign])
        build_tier(tier, chosen.root, workers=chosen.workers)
        pairs = load(tier, chosen.root, registry)
        scores = measure(pairs, Scorer(registry, chosen.root, tier, pairs[0].tokenizer))
        sys.stdout.write("".join(f"{row}\n" for row in report(tier, scores)))


if __name__ == "__main__":
    main()
