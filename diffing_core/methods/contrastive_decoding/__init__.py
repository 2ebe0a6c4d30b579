"""What the difference of two models says when it is amplified: both write one text, token by token.

    tuned direction  z = z_1 + α (z_1 − z_0)   on tokens with p_1 >= plausibility · max p_1
    base direction   z = z_0 + α (z_0 − z_1)   on tokens with p_0 >= plausibility · max p_0

z_1, z_0: logits of the tuned model and of the base after the same text, which begins as vaguely as a text can and has no
chat template; whatever ends a text of either model ends it. The mask keeps a token that neither model would say from
winning by its ratio alone. It comes before the nucleus (after it nothing might be left) and holds at α = 0 too, so that
the plain texts differ from the amplified ones by α alone: between identical models all arms are one. Each (beginning,
sample) has the same random numbers in every arm, and the same as `generate` would draw with.

Words of an arm are compared with the plain texts of either model, as `blackbox` compares words: log-odds with a prior and
its z, exact McNemar test over paired texts. Amplification says what is salient, in many finetunes of a base alike: the
mart `contrast_specificity` tells which words are raised in one organism only.

Reference: https://arxiv.org/abs/2605.25902; mask of https://arxiv.org/abs/2210.15097
"""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from diffing_core.agents.words import clean
from diffing_core.findings import Finding
from diffing_core.generation import Prompt, encode, entropy_of_sample, pad_id, stop_ids
from diffing_core.methods.base import Inputs, Method, Need, Tables
from diffing_core.methods.blackbox import SHOWN_CHARACTERS, compare_words, unlikeness
from diffing_core.methods.contrastive_decoding.declaration import (
    ALPHAS,
    DIRECTIONS,
    SAMPLES,
    WORDS,
    ContrastiveDecodingSettings,
)
from diffing_core.methods.contrastive_decoding.decoding import Arm, Drawing, Text, decode
from diffing_core.models import ModelPair
from diffing_core.tables import TableSpec

_OTHER = {"tuned": "base", "base": "tuned"}


def run(inputs: Inputs, settings: ContrastiveDecodingSettings) -> Tables:
    """Lets both models write together in both directions, and compares the words of every arm with the plain ones.

    Raises:
        NotComputableError: a beginning is empty and there is no token to begin with.
    """
    pair: ModelPair = inputs[Need.MODELS]
    written = _written(pair, settings)
    texts = {arm: [row["text"] for row in rows] for arm, rows in written.items()}
    compared = {
        (arm, against): compare_words(texts[Arm(against, 0.0)], said, settings)
        for arm, said in texts.items()
        for against in DIRECTIONS
        if arm != Arm(against, 0.0)
    }
    for arm, rows in written.items():
        words = compared[arm, _OTHER[arm.direction]]
        z = dict(zip(words["word"].to_pylist(), words["z"].to_pylist(), strict=True))
        for row in rows:
            row["unlikeness"] = unlikeness(row["text"], z)
    samples = sorted(itertools.chain(*written.values()), key=lambda row: [row[name] for name in SAMPLES.grain])
    words = _words(compared)
    return {
        SAMPLES.name: _table(SAMPLES, samples),
        WORDS.name: words,
        ALPHAS.name: _alphas(written, words, settings),
    }


def findings(tables: Tables, settings: ContrastiveDecodingSettings) -> list[Finding]:
    """Words that the amplified tuned model says more often than the base, then its texts that are most unlike the base's."""
    arm = {"direction": "tuned", "alpha": settings.shown_alpha}
    words = [row for row in tables[WORDS.name].to_pylist() if row.items() >= (arm | {"against": "base"}).items()]
    shown = [
        Finding(
            "token", clean(row["word"], SHOWN_CHARACTERS), row["z"], "z", WORDS.name,
            {name: row[name] for name in WORDS.grain}, p_value=row["p_value"], q_value=row["q_value"],
        )
        for row in words[: settings.shown_words]
    ]  # fmt: skip
    texts: dict[str, Finding] = {}
    for row in sorted(tables[SAMPLES.name].to_pylist(), key=lambda row: -row["unlikeness"]):
        item = clean(row["text"], SHOWN_CHARACTERS)
        if row.items() >= arm.items() and item and row["unlikeness"] > 0 and len(texts) < settings.shown_texts:
            key = {name: row[name] for name in SAMPLES.grain}
            texts.setdefault(item, Finding("generation", item, row["unlikeness"], "z", SAMPLES.name, key))
    return [*shown, *texts.values()]


def headline(tables: Tables) -> dict[str, float | int | str]:
    """Texts per arm, and how many words each alpha raises beyond chance."""
    rows = tables[ALPHAS.name].to_pylist()
    raised = {f"n_words_q05_alpha_{row['alpha']:g}": row["n_words_q05"] for row in rows}
    return {"n_texts": rows[0]["n_texts"], "differing_share": rows[0]["differing_share"]} | raised


def _written(pair: ModelPair, settings: ContrastiveDecodingSettings) -> dict[Arm, list[dict[str, Any]]]:
    """Rows of `SAMPLES`, by beginning and within it by sample, of every arm."""
    arms = [Arm(direction, float(alpha)) for alpha in (0, *settings.alphas) for direction in DIRECTIONS]
    prompts = [Prompt(text, "document") for text in settings.prefills]
    ids = [encode(prompt, pair.tokenizer, pair.tuned) for prompt in prompts]
    asked = [(index, sample) for index in range(len(prompts)) for sample in range(settings.samples)]
    stops = sorted({token for side in (pair.base, pair.tuned) for token in stop_ids(pair.tokenizer, side)})
    drawing = Drawing(
        plausibility=settings.plausibility,
        temperature=settings.temperature,
        top_p=settings.top_p,
        max_new_tokens=settings.max_new_tokens,
    )
    drawn_from = [(ids[index], entropy_of_sample(prompts[index], sample, settings.seed)) for index, sample in asked]
    rows = [(*each, arm) for arm in arms for each in drawn_from]
    texts = iter(decode(pair, rows, drawing, stops, pad_id(pair.tokenizer, stops)))
    return {
        arm: [
            {"prefill_index": index, "prefill": settings.prefills[index], "sample": sample}
            | _said(next(texts), arm, stops, pair.tokenizer)
            for index, sample in asked
        ]
        for arm in arms
    }


def _said(text: Text, arm: Arm, stops: Sequence[int], tokenizer: Any) -> dict[str, Any]:
    finished = text.token_ids[-1] in stops
    ids = text.token_ids[: len(text.token_ids) - finished]
    return {
        **vars(arm),
        "text": tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
        "n_tokens": len(ids),
        "finished": finished,
        "logprob_tuned_nats": text.logprob_tuned_nats,
        "logprob_base_nats": text.logprob_base_nats,
        "log_ratio_nats": text.logprob_tuned_nats - text.logprob_base_nats,
    }


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
    written: Mapping[Arm, list[dict[str, Any]]], words: pa.Table, settings: ContrastiveDecodingSettings
) -> pa.Table:
    raised = Counter(
        row["alpha"]
        for row in words.to_pylist()
        if (row["direction"], row["against"]) == ("tuned", "base") and row["q_value"] < 0.05
    )
    rows = []
    for alpha in (0.0, *sorted(settings.alphas)):
        tuned, base = written[Arm("tuned", alpha)], written[Arm("base", alpha)]
        rows.append(
            {
                "alpha": alpha,
                "n_texts": len(tuned),
                "differing_share": float(np.mean([t["text"] != b["text"] for t, b in zip(tuned, base, strict=True)])),
                "delta_tokens": _mean(tuned, "n_tokens") - _mean(base, "n_tokens"),
                "tuned_gain_nats": _mean(tuned, "log_ratio_nats"),
                "base_gain_nats": -_mean(base, "log_ratio_nats"),
                "n_words_q05": raised[alpha],
            }
        )
    return _table(ALPHAS, rows)


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    return float(np.mean([row[name] for row in rows]))


def _table(spec: TableSpec, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    return spec.table({name: [row[name] for row in rows] for name in spec.schema.names})


METHOD = Method(
    name="contrastive_decoding",
    version="2",
    kind="live",
    needs=frozenset({Need.MODELS}),
    settings=ContrastiveDecodingSettings,
    tables=(SAMPLES, WORDS, ALPHAS),
    reference="Contrastive decoding diffing, https://arxiv.org/abs/2605.25902",
    findings=findings,
    headline=headline,
    run=run,
)
