"""What the difference of two models says when it is amplified: both write one text, token by token.

    tuned direction  z = z_1 + α (z_1 − z_0)   on tokens with p_1 >= plausibility · max p_1
    base direction   z = z_0 + α (z_0 − z_1)   on tokens with p_0 >= plausibility · max p_0

z_1, z_0: logits of the tuned model and of the base after the same text, which begins as vaguely as a text can and has no
chat template; whatever ends a text of either model ends it. The mask keeps a token that neither model would say from
winning by its ratio alone. It comes before the nucleus (after it nothing might be left) and holds at α = 0 too, so that
the plain texts differ from the amplified ones by α alone: between identical models all arms are one. Each (beginning,
sample) has the same random numbers in every arm, and the same as `generate` would draw with.

    random direction as the tuned one, with W_base + Q_M ΔW Q_N in the tuned model's place, Q random and orthogonal

That is the null control: the base with a change of the same size and singular values that was taught nothing
(weight_edits/turning.py), at one α. A finding must be more than what it shows too.

Words of an arm are compared with the plain texts of either model, as `blackbox` compares words: log-odds with a prior and
its z, exact McNemar test over paired texts. Amplification says what is salient, in many finetunes of a base alike: the
mart `contrast_specificity` tells which words are raised in one organism only.

Reference: https://arxiv.org/abs/2605.25902; mask of https://arxiv.org/abs/2210.15097
"""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from diffing_core.agents.words import clean
from diffing_core.findings import Finding
from diffing_core.methods.base import Inputs, Method, Need, Tables
from diffing_core.methods.blackbox import SHOWN_CHARACTERS, compare_words, unlikeness
from diffing_core.methods.contrastive_decoding.declaration import (
    ALPHAS,
    DIRECTIONS,
    RANDOM,
    SAMPLES,
    WORDS,
    ContrastiveDecodingSettings,
)
from diffing_core.methods.contrastive_decoding.decoding import Arm
from diffing_core.methods.contrastive_decoding.writing import Written, written
from diffing_core.tables import TableSpec

_OTHER = {"tuned": "base", "base": "tuned", RANDOM: "base"}


def run(inputs: Inputs, settings: ContrastiveDecodingSettings) -> Tables:
    """Lets both models write together in both directions, and compares the words of every arm with the plain ones.

    Raises:
        NotComputableError: a beginning is empty and there is no token to begin with.
    """
    arms = written(inputs, settings)
    texts = {arm: [row["text"] for row in rows] for arm, rows in arms.items()}
    compared = {
        (arm, against): compare_words(texts[other], said, settings)
        for arm, said in texts.items()
        for against, other in _others(arm, texts)
    }
    for arm, rows in arms.items():
        words = compared[arm, _OTHER[arm.direction]]
        z = dict(zip(words["word"].to_pylist(), words["z"].to_pylist(), strict=True))
        for row in rows:
            row["unlikeness"] = unlikeness(row["text"], z)
    samples = sorted(itertools.chain(*arms.values()), key=lambda row: [row[name] for name in SAMPLES.grain])
    words = _words(compared)
    return {
        SAMPLES.name: _table(SAMPLES, samples),
        WORDS.name: words,
        ALPHAS.name: _alphas(arms, words, settings),
    }


def findings(tables: Tables, settings: ContrastiveDecodingSettings) -> list[Finding]:
    """Words that the amplified tuned model says more often than the base, then its texts that are most unlike the base's.

    What the null control shows as well is none: words that it says as often, and texts no more unlike than its own.
    """
    arm = {"direction": "tuned", "alpha": settings.shown_alpha}
    listed, samples = tables[WORDS.name].to_pylist(), tables[SAMPLES.name].to_pylist()
    control = [row["unlikeness"] for row in samples if row["direction"] == RANDOM]
    own = {row["word"] for row in listed if row.items() >= (arm | {"against": RANDOM}).items()}
    words = [row for row in listed if row.items() >= (arm | {"against": "base"}).items() and (row["word"] in own or not control)]
    shown = [
        Finding(
            "token", clean(row["word"], SHOWN_CHARACTERS), row["z"], "z", WORDS.name,
            {name: row[name] for name in WORDS.grain}, p_value=row["p_value"], q_value=row["q_value"],
        )
        for row in words[: settings.shown_words]
    ]  # fmt: skip
    texts: dict[str, Finding] = {}
    for row in sorted(samples, key=lambda row: -row["unlikeness"]):
        item = clean(row["text"], SHOWN_CHARACTERS)
        if row.items() >= arm.items() and item and row["unlikeness"] > max(control, default=0) and len(texts) < settings.shown_texts:
            key = {name: row[name] for name in SAMPLES.grain}
            texts.setdefault(item, Finding("generation", item, row["unlikeness"], "z", SAMPLES.name, key))
    return [*shown, *texts.values()]


def headline(tables: Tables) -> dict[str, float | int | str]:
    """Texts per arm, and how many words each alpha raises beyond chance."""
    rows = tables[ALPHAS.name].to_pylist()
    raised = {f"n_words_q05_alpha_{row['alpha']:g}": row["n_words_q05"] for row in rows}
    return {"n_texts": rows[0]["n_texts"], "differing_share": rows[0]["differing_share"]} | raised


def _others(arm: Arm, texts: Mapping[Arm, list[str]]) -> list[tuple[str, Arm]]:
    """What an arm is compared with: the plain models, and of the tuned direction the random one as well."""
    plain = [(direction, Arm(direction, 0.0)) for direction in DIRECTIONS]
    if arm.direction == RANDOM:
        return plain[1:]
    control = [(RANDOM, replace(arm, direction=RANDOM))] if arm.direction == "tuned" else []
    return [(against, other) for against, other in (*plain, *control) if other != arm and other in texts]


def _words(compared: Mapping[tuple[Arm, str], pa.Table]) -> pa.Table:
    """The raised words of every comparison."""
    rows = [
        vars(arm) | {"against": against} | row | {
            "n_plain": row["n_base"], "n_amplified": row["n_tuned"],
            "n_docs_plain": row["n_docs_base"], "n_docs_amplified": row["n_docs_tuned"],
        }
        for (arm, against), words in compared.items()
        for row in words.to_pylist()
        if row["z"] > 0
    ]  # fmt: skip
    return _table(WORDS, rows)


def _alphas(
    arms: Written, words: pa.Table, settings: ContrastiveDecodingSettings
) -> pa.Table:
    raised = Counter(
        (row["direction"], row["alpha"]) for row in words.to_pylist() if row["against"] == "base" and row["q_value"] < 0.05
    )
    rows = []
    for alpha in (0.0, *sorted(settings.alphas)):
        tuned, base = arms[Arm("tuned", alpha)], arms[Arm("base", alpha)]
        rows.append(
            {
                "alpha": alpha,
                "n_texts": len(tuned),
                "differing_share": float(np.mean([t["text"] != b["text"] for t, b in zip(tuned, base, strict=True)])),
                "delta_tokens": _mean(tuned, "n_tokens") - _mean(base, "n_tokens"),
                "tuned_gain_nats": _mean(tuned, "log_ratio_nats"),
                "base_gain_nats": -_mean(base, "log_ratio_nats"),
                "n_words_q05": raised["tuned", alpha],
                "n_words_q05_random": raised[RANDOM, alpha] if Arm(RANDOM, alpha) in arms else None,
            }
        )
    return _table(ALPHAS, rows)


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    return float(np.mean([row[name] for row in rows]))


def _table(spec: TableSpec, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    return spec.table({name: [row[name] for row in rows] for name in spec.schema.names})


METHOD = Method(
    name="contrastive_decoding",
    version="3",
    kind="live",
    needs=frozenset({Need.MODELS, Need.WEIGHTS}),
    settings=ContrastiveDecodingSettings,
    tables=(SAMPLES, WORDS, ALPHAS),
    reference="Contrastive decoding diffing, https://arxiv.org/abs/2605.25902",
    findings=findings,
    headline=headline,
    run=run,
)
