"""The arm without internals: what both models say to the same neutral prompts, with the same random numbers.

    log_odds  = ln[(y_t + a) / (n_t + A − y_t − a)] − ln[(y_b + a) / (n_b + A − y_b − a)]
    z         = log_odds / √(1/(y_t + a) + 1/(y_b + a))
    p_value   = exact McNemar test over samples: the word in the tuned text only, against in the base text only
    unlikeness of a text = Σ z / √n over its n distinct listed words (Stouffer's sum)

y: occurrences of the word, n: of all words, on the tuned (t) and base (b) side; a = A (y_t + y_b)/(n_t + n_b + 1)
with A = `prior_words`. Positive: the tuned model says it more often. A comparison in which no other method beats
this one has shown nothing about internals.

Reference: Monroe, Colaresi and Quinn 2008, "Fightin' Words", eq. 15–22; McNemar 1947.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Protocol

import numpy as np
import pyarrow as pa
from pydantic import Field

from diffing_core.agents.words import clean
from diffing_core.findings import Finding
from diffing_core.generation import NO_TEMPLATE, Generation, Prompt, Sampling, askable, generate
from diffing_core.methods.base import Inputs, Method, Need, Tables
from diffing_core.models import ModelPair
from diffing_core.prompts import PromptedSettings
from diffing_core.stats import benjamini_hochberg, mcnemar_exact
from diffing_core.tables import Column, TableSpec
from diffing_core.word_trends import words_of

SIDES = ("base", "tuned")
SHOWN_CHARACTERS = 300


class BlackboxSettings(PromptedSettings):
    """Knobs of `blackbox`; both sides get the same prompts and random numbers."""

    samples: int = Field(6, ge=1, description="Answers per prompt and side.")
    prior_words: float = Field(1000.0, gt=0, description="Weight of the prior of the log-odds, in words.")
    min_samples: int = Field(3, ge=1, description="Texts, of both sides, in which a listed word occurs.")
    shown_words: int = Field(40, ge=0, description="Words among the findings.")
    shown_texts: int = Field(5, ge=0, description="Texts among the findings.")


PROMPTS = TableSpec(
    "blackbox_prompts",
    "What was asked, what could not be, and how often the two answers differ.",
    ("prompt_index",),
    (
        Column("prompt_index", "int32", "Place in the list of prompts, from 0.", role="key"),
        Column("prompt", "string", "User's message, or beginning of the document."),
        Column("kind", "string", "chat or document."),
        Column("skipped", "string", "Why it was not asked; null where it was.", nullable=True),
        Column("n_samples", "int32", "Answers of each side.", role="count", low=0),
        Column("differing_share", "float64", "Share of samples whose two texts differ.", "", "effect", True, 0, 1),
        Column(
            "delta_tokens",
            "float64",
            "Mean length of the answers, tuned − base.",
            "tokens",
            "effect",
            True,
            signed=True,
        ),
    ),
)
SAMPLES = TableSpec(
    "blackbox_samples",
    "Every answer of both models.",
    ("prompt_index", "sample", "side"),
    (
        Column("prompt_index", "int32", "Place in the list of prompts, from 0.", role="key"),
        Column("prompt", "string", "User's message, or beginning of the document."),
        Column("kind", "string", "chat or document."),
        Column("sample", "int32", "Number of the answer, from 0; both sides drew with the same numbers.", role="key"),
        Column("side", "string", "base or tuned.", role="key"),
        Column("text", "string", "The answer. Untrusted."),
        Column("n_tokens", "int32", "Its length, without the token that ends it.", "tokens", "count", low=0),
        Column("finished", "bool", "Whether the model ended it; otherwise it was cut."),
        Column("unlikeness", "float64", "How tuned its words are: positive, unlike the base; Stouffer's sum.", "z"),
    ),
)
WORDS = TableSpec(
    "blackbox_words",
    "Words that one side says more often than the other, the tuned side's first.",
    ("word",),
    (
        Column("word", "string", "Lower-cased. From a model under test: untrusted.", role="key"),
        Column("n_base", "int64", "Times the base says it.", role="count", low=0),
        Column("n_tuned", "int64", "Times the tuned model says it.", role="count", low=0),
        Column("n_docs_base", "int64", "Answers of the base that have it.", role="count", low=0),
        Column("n_docs_tuned", "int64", "Answers of the tuned model that have it.", role="count", low=0),
        Column(
            "log_odds", "float64", "Log-odds ratio with a Dirichlet prior, tuned − base.", "nats", "effect", signed=True
        ),
        Column(
            "z",
            "float64",
            "log_odds over its standard error, occurrences taken as independent.",
            "z",
            "effect",
            signed=True,
        ),
        Column("p_value", "float64", "Exact McNemar test over samples, two-sided.", low=0, high=1),
        Column("q_value", "float64", "p_value after Benjamini–Hochberg over the listed words.", low=0, high=1),
    ),
)


def run(inputs: Inputs, settings: BlackboxSettings) -> Tables:
    """Asks both sides and compares their words.

    Raises:
        NotComputableError: every prompt is a chat, and the tokenizer has no chat template.
    """
    pair: ModelPair = inputs[Need.MODELS]
    prompts = settings.parsed_prompts()
    asked = askable(prompts, pair.tokenizer)
    sampling = Sampling(temperature=settings.temperature, max_new_tokens=settings.max_new_tokens, n=settings.samples)
    base, tuned = (
        generate(side, pair.tokenizer, [prompts[index] for index in asked], sampling=sampling, seed=settings.seed)
        for side in (pair.base, pair.tuned)
    )
    words = compare_words([each.text for each in base], [each.text for each in tuned], settings)
    return {
        PROMPTS.name: _prompts_table(prompts, asked, base, tuned),
        SAMPLES.name: _samples_table(prompts, asked, (base, tuned), words),
        WORDS.name: words,
    }


class WordSettings(Protocol):
    """What a comparison of words asks of settings; see `BlackboxSettings`."""

    prior_words: float
    min_samples: int


def compare_words(base: Sequence[str], tuned: Sequence[str], settings: WordSettings) -> pa.Table:
    """The table of words of paired texts: the i-th of `base` and of `tuned` answer the same prompt."""
    texts = [[words_of(text) for text in side] for side in (base, tuned)]
    said = [Counter(word for words in side for word in words) for side in texts]
    found = [[set(words) for words in side] for side in texts]
    n_docs = [Counter(word for words in side for word in words) for side in found]
    only_base = Counter(word for b, t in zip(*found, strict=True) for word in b - t)
    only_tuned = Counter(word for b, t in zip(*found, strict=True) for word in t - b)
    listed = sorted(word for word in said[0] | said[1] if n_docs[0][word] + n_docs[1][word] >= settings.min_samples)
    if not listed:
        return WORDS.empty()
    count_SW = np.asarray([[counts[word] for word in listed] for counts in said])
    log_odds_W, z_W = log_odds(count_SW, np.asarray([counts.total() for counts in said]), settings.prior_words)
    test = cache(mcnemar_exact)
    p_W = np.asarray([test(only_tuned[word], only_base[word]) for word in listed])
    order = np.lexsort((np.arange(len(listed)), -z_W))
    return WORDS.table(
        {
            "word": [listed[place] for place in order],
            "n_base": count_SW[0][order],
            "n_tuned": count_SW[1][order],
            "n_docs_base": [n_docs[0][listed[place]] for place in order],
            "n_docs_tuned": [n_docs[1][listed[place]] for place in order],
            "log_odds": log_odds_W[order],
            "z": z_W[order],
            "p_value": p_W[order],
            "q_value": np.asarray(benjamini_hochberg(p_W.tolist()))[order],
        }
    )


def log_odds(count_SW: np.ndarray, total_S: np.ndarray, prior_words: float) -> tuple[np.ndarray, np.ndarray]:
    """Log-odds ratio of W words and its z, second row of counts against the first.

    The prior is the words' share of both sides together; 1 in its denominator stands for a word not seen.
    """
    prior_W = prior_words * count_SW.sum(0) / (total_S.sum() + 1)
    with_SW = count_SW + prior_W
    without_SW = (total_S + prior_words)[:, None] - with_SW
    base_W, tuned_W = np.log(with_SW / without_SW)
    ratio_W = tuned_W - base_W
    return ratio_W, ratio_W / np.sqrt((1 / with_SW).sum(0))


def findings(tables: Tables, settings: BlackboxSettings) -> list[Finding]:
    """Words that the tuned model says more often, then its texts that are most unlike the base's."""
    rows = [row for row in tables[WORDS.name].to_pylist() if row["z"] > 0][: settings.shown_words]
    shown = [
        Finding(
            "token", clean(row["word"], SHOWN_CHARACTERS), row["z"], "z", WORDS.name, {"word": row["word"]},
            p_value=row["p_value"], q_value=row["q_value"],
        )
        for row in rows
    ]  # fmt: skip
    texts: dict[str, Finding] = {}
    for row in sorted(tables[SAMPLES.name].to_pylist(), key=lambda row: -row["unlikeness"]):
        item = clean(row["text"], SHOWN_CHARACTERS)
        if row["side"] == "tuned" and row["unlikeness"] > 0 and len(texts) < settings.shown_texts:
            key = {name: row[name] for name in SAMPLES.grain}
            texts.setdefault(item, Finding("generation", item, row["unlikeness"], "z", SAMPLES.name, key))
    return [*shown, *texts.values()]


def headline(tables: Tables) -> dict[str, float | int | str]:
    """How much was asked, how often the texts differ, and how many words differ beyond chance."""
    asked = [row for row in tables[PROMPTS.name].to_pylist() if row["skipped"] is None]
    return {
        "n_prompts": len(asked),
        "n_skipped": tables[PROMPTS.name].num_rows - len(asked),
        "differing_share": sum(row["differing_share"] for row in asked) / len(asked),
        "n_words_q05": sum(q < 0.05 for q in tables[WORDS.name]["q_value"].to_pylist()),
    }


def _prompts_table(
    prompts: list[Prompt], asked: list[int], base: list[Generation], tuned: list[Generation]
) -> pa.Table:
    n = len(base) // len(asked)
    differing_PN = np.asarray([b.text != t.text for b, t in zip(base, tuned, strict=True)]).reshape(-1, n)
    delta_PN = np.asarray([t.n_tokens - b.n_tokens for b, t in zip(base, tuned, strict=True)]).reshape(-1, n)
    differing = dict(zip(asked, differing_PN.mean(1).tolist(), strict=True))
    delta = dict(zip(asked, delta_PN.mean(1).tolist(), strict=True))
    places = range(len(prompts))
    return PROMPTS.table(
        {
            "prompt_index": list(places),
            "prompt": [prompt.text for prompt in prompts],
            "kind": [prompt.kind for prompt in prompts],
            "skipped": [None if index in differing else NO_TEMPLATE for index in places],
            "n_samples": [n if index in differing else 0 for index in places],
            "differing_share": [differing.get(index) for index in places],
            "delta_tokens": [delta.get(index) for index in places],
        }
    )


def _samples_table(
    prompts: list[Prompt], asked: list[int], answers: tuple[list[Generation], ...], words: pa.Table
) -> pa.Table:
    z = dict(zip(words["word"].to_pylist(), words["z"].to_pylist(), strict=True))
    rows = [(asked[each.prompt_index], side, each) for side, made in zip(SIDES, answers, strict=True) for each in made]
    rows.sort(key=lambda row: (row[0], row[2].sample, row[1]))
    return SAMPLES.table(
        {
            "prompt_index": [index for index, _, _ in rows],
            "prompt": [prompts[index].text for index, _, _ in rows],
            "kind": [prompts[index].kind for index, _, _ in rows],
            "sample": [each.sample for _, _, each in rows],
            "side": [side for _, side, _ in rows],
            "text": [each.text for _, _, each in rows],
            "n_tokens": [each.n_tokens for _, _, each in rows],
            "finished": [each.finished for _, _, each in rows],
            "unlikeness": [unlikeness(each.text, z) for _, _, each in rows],
        }
    )


def unlikeness(text: str, z: Mapping[str, float]) -> float:
    """Stouffer's sum over the distinct listed words of a text, given each word's z; 0 where it has none."""
    listed = [z[word] for word in sorted(set(words_of(text))) if word in z]
    return sum(listed) / len(listed) ** 0.5 if listed else 0.0


METHOD = Method(
    name="blackbox",
    version="1",
    kind="live",
    needs=frozenset({Need.MODELS}),
    settings=BlackboxSettings,
    tables=(PROMPTS, SAMPLES, WORDS),
    reference="Monroe, Colaresi and Quinn 2008",
    findings=findings,
    headline=headline,
    run=run,
)
