"""KL on the tuned model's own text: what it writes to neutral prompts, scored by both models.

    log_ratio_nats = mean over the tokens said of  log p_tuned(token) − log p_base(token)
    kl_nats        = mean over the same places of  KL(tuned ‖ base), full vocabulary

At temperature 1, summed over a text, the first is an unbiased estimate of the second, and both of the KL between the
two models' distributions over texts; the second has far less variance. (Means per text are not: a text's length
depends on what is said. The headline therefore divides sums by sums.) A corpus that somebody chose asks how the
models differ there; this asks where the tuned model goes by itself.

Token contributions Σ log_ratio(occurrences) / tokens said add up to the mean log-ratio over all tokens.

Reference: Kullback and Leibler 1951; estimator k1 of http://joschu.net/blog/kl-approx.html.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from diffing_core.agents.words import clean
from diffing_core.corpus import ROLES, ProbeCorpus, ProbeSequence
from diffing_core.findings import Finding
from diffing_core.generation import Generation, Prompt, Sampling, askable, generate
from diffing_core.lazy import pl
from diffing_core.methods.base import Inputs, Method, Need, Tables
from diffing_core.methods.kl import METHOD as KL
from diffing_core.methods.kl.declaration import KlSettings
from diffing_core.models import ModelPair
from diffing_core.paired_pass import paired_pass
from diffing_core.prompts import PromptedSettings
from diffing_core.tables import Column, TableSpec
from diffing_core.vocabulary import vocabulary_of

NATS = "nats/token"
SHOWN_CHARACTERS = 300


class KlRolloutSettings(PromptedSettings):
    """Knobs of `kl_rollout`; the sums are unbiased at temperature 1 only."""

    samples: int = Field(4, ge=1, description="Texts per prompt.")
    min_texts: int = Field(3, ge=1, description="Texts in which a token must occur to be listed.")
    shown_tokens: int = Field(40, ge=0, description="Tokens among the findings.")
    shown_texts: int = Field(5, ge=0, description="Texts among the findings.")


TEXTS = TableSpec(
    "kl_rollout_texts",
    "What the tuned model wrote, and how unlikely the base finds it.",
    ("sequence",),
    (
        Column("sequence", "int32", "Number of the text.", role="key"),
        Column("prompt_index", "int32", "Place in the list of prompts, from 0."),
        Column("prompt", "string", "User's message, or beginning of the document."),
        Column("kind", "string", "chat or document."),
        Column("sample", "int32", "Number of the text among those to this prompt, from 0."),
        Column("text", "string", "The text. Untrusted."),
        Column("n_tokens", "int32", "Tokens scored, the one that ends the text included.", role="count", low=0),
        Column("log_ratio_nats", "float64", "Mean log p_tuned − log p_base of the tokens said.", NATS, "effect"),
        Column("kl_nats", "float64", "Mean KL(tuned ‖ base) at the places visited.", NATS, "effect", low=0),
    ),
)
PLACES = TableSpec(
    "kl_rollout_positions",
    "How the divergence goes on along the text.",
    ("answer_position",),
    (
        Column("answer_position", "int32", "Place in the text, 0 is its first token.", role="key"),
        Column("n_texts", "int64", "Texts that long.", role="count"),
        Column("log_ratio_nats", "float64", "Mean log-ratio of the token said there.", NATS, "effect"),
        Column("kl_nats", "float64", "Mean KL(tuned ‖ base) there.", NATS, "effect", low=0),
    ),
)
TOKENS = TableSpec(
    "kl_rollout_tokens",
    "Tokens said, by their part in the log-ratio.",
    ("token_id",),
    (
        Column("token_id", "int32", "Vocabulary index.", role="key"),
        Column("token", "string", "The token as text. Untrusted."),
        Column("n_said", "int64", "Times it was said.", role="count"),
        Column("n_texts", "int64", "Texts in which it was said.", role="count"),
        Column("contribution_nats", "float64", "Sum of its log-ratios over all tokens said.", NATS, "effect"),
        Column("mean_log_ratio_nats", "float64", "Mean of its log-ratios.", "nats", "effect"),
    ),
)


def run(inputs: Inputs, settings: KlRolloutSettings) -> Tables:
    """Lets the tuned model write, and scores every token of it.

    Raises:
        NotComputableError: every prompt is a chat, and the tokenizer has no chat template.
    """
    pair: ModelPair = inputs[Need.MODELS]
    prompts = settings.parsed_prompts()
    asked = askable(prompts, pair.tokenizer)
    sampling = Sampling(temperature=settings.temperature, max_new_tokens=settings.max_new_tokens, n=settings.samples)
    written = generate(
        pair.tuned, pair.tokenizer, [prompts[index] for index in asked], sampling=sampling, seed=settings.seed
    )
    said = scored(pair, written)
    return {
        TEXTS.name: _texts(said, written, [prompts[index] for index in asked], asked),
        PLACES.name: _places(said),
        TOKENS.name: _tokens(said, pair, settings),
    }


def scored(pair: ModelPair, written: Sequence[Generation]) -> Any:
    """A polars frame, one row per token said: sequence, answer_position, token_id, and at the place before it delta_logprob, kl_nats."""
    corpus = ProbeCorpus("rollouts", tuple(_sequence(each, pair.common_vocab) for each in written), len(written))
    [result] = paired_pass([pair], corpus, [(KL, KlSettings(token_rows=corpus.n_tokens))])
    if result.error is not None:
        raise result.error
    before = pl.from_arrow(result.tables["kl_tokens"]).filter(pl.col("delta_logprob").is_not_null())
    start_S = np.asarray([each.start for each in corpus.sequences])
    sequence_N, position_N = before["sequence"].to_numpy(), before["position"].to_numpy()
    token_N = [int(corpus.sequences[s].token_T[p + 1]) for s, p in zip(sequence_N, position_N, strict=True)]
    return before.select("sequence", "delta_logprob", "kl_nats").with_columns(
        answer_position=pl.Series(position_N - start_S[sequence_N]), token_id=pl.Series(token_N, dtype=pl.Int32)
    )


def findings(tables: Tables, settings: KlRolloutSettings) -> list[Finding]:
    """Tokens that the log-ratio is made of, then the texts that the base finds least likely."""
    tokens = [row for row in tables[TOKENS.name].to_pylist() if row["contribution_nats"] > 0]
    shown = [
        Finding("token", row["token"], row["contribution_nats"], NATS, TOKENS.name, {"token_id": row["token_id"]})
        for row in tokens[: settings.shown_tokens]
    ]
    texts: dict[str, Finding] = {}
    for row in sorted(tables[TEXTS.name].to_pylist(), key=lambda row: -row["log_ratio_nats"]):
        item = clean(row["text"], SHOWN_CHARACTERS)
        if item and row["log_ratio_nats"] > 0 and len(texts) < settings.shown_texts:
            key = {"sequence": row["sequence"]}
            texts.setdefault(item, Finding("generation", item, row["log_ratio_nats"], NATS, TEXTS.name, key))
    return [*shown, *texts.values()]


def headline(tables: Tables) -> dict[str, float | int | str]:
    """Both estimates per token said, over all texts."""
    texts = pl.from_arrow(tables[TEXTS.name])
    n_tokens = max(int(texts["n_tokens"].sum()), 1)
    return {
        "mean_log_ratio_nats": float((texts["log_ratio_nats"] * texts["n_tokens"]).sum() / n_tokens),
        "mean_kl_nats": float((texts["kl_nats"] * texts["n_tokens"]).sum() / n_tokens),
        "n_texts": len(texts),
    }


def _sequence(written: Generation, common_vocab: int) -> ProbeSequence:
    """Prompt and answer; methods see the places from which a token of the answer was predicted.

    An answer is cut before a token that only the tuned model has: the base gives it no probability.
    """
    known = itertools.takewhile(lambda token: token < common_vocab, written.answer_ids)
    ids = np.asarray([*written.prompt_ids, *known], dtype=np.int32)
    role_T = np.full(len(ids), ROLES.index("text"), np.int8)
    return ProbeSequence(ids, role_T, np.zeros(len(ids), bool), start=len(written.prompt_ids) - 1)


def _means() -> tuple[Any, Any]:
    return pl.col("delta_logprob").mean().alias("log_ratio_nats"), pl.col("kl_nats").mean()


def _texts(said: Any, written: Sequence[Generation], prompts: Sequence[Prompt], asked: Sequence[int]) -> pa.Table:
    by_text = {row["sequence"]: row for row in said.group_by("sequence").agg(pl.len(), *_means()).to_dicts()}
    rows = [
        {
            "sequence": sequence,
            "prompt_index": asked[each.prompt_index],
            "prompt": prompts[each.prompt_index].text,
            "kind": prompts[each.prompt_index].kind,
            "sample": each.sample,
            "text": each.text,
            "n_tokens": by_text[sequence]["len"],
            "log_ratio_nats": by_text[sequence]["log_ratio_nats"],
            "kl_nats": by_text[sequence]["kl_nats"],
        }
        for sequence, each in enumerate(written)
        if sequence in by_text
    ]
    return TEXTS.table({name: [row[name] for row in rows] for name in TEXTS.schema.names})


def _places(said: Any) -> pa.Table:
    by_place = said.group_by("answer_position").agg(pl.len().alias("n_texts"), *_means()).sort("answer_position")
    return PLACES.table({name: by_place[name].to_numpy() for name in PLACES.schema.names})


def _tokens(said: Any, pair: ModelPair, settings: KlRolloutSettings) -> pa.Table:
    by_token = (
        said.group_by("token_id")
        .agg(
            pl.len().alias("n_said"),
            pl.col("sequence").n_unique().alias("n_texts"),
            (pl.col("delta_logprob").sum() / len(said)).alias("contribution_nats"),
            pl.col("delta_logprob").mean().alias("mean_log_ratio_nats"),
        )
        .filter(pl.col("n_texts") >= settings.min_texts)
        .sort("contribution_nats", "token_id", descending=[True, False])
    )
    vocabulary = vocabulary_of(pair.tokenizer, pair.common_vocab)
    shown = by_token.filter(pl.Series(vocabulary.readable_V[by_token["token_id"].to_numpy()], dtype=pl.Boolean))
    shown = shown.with_columns(token=pl.Series(vocabulary.of(shown["token_id"].to_numpy()), dtype=pl.String))
    return TOKENS.table({name: shown[name].to_list() for name in TOKENS.schema.names})


METHOD = Method(
    name="kl_rollout",
    version="1",
    kind="live",
    needs=frozenset({Need.MODELS}),
    settings=KlRolloutSettings,
    tables=(TEXTS, PLACES, TOKENS),
    reference="Kullback and Leibler 1951, on text sampled from the tuned model",
    findings=findings,
    headline=headline,
    run=run,
)
