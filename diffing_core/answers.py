"""Several models asked the same prompts with the same random numbers, and the tables of what they said.

Each model answers while it is there (an edited one lasts for its `with` block), so at most one is loaded beside the pair.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from pydantic import Field

from diffing_core.agents.words import clean
from diffing_core.coherence import distinct_share, grades, mean_logprobs, mean_over_tokens, measures, repeated_share
from diffing_core.findings import Finding
from diffing_core.generation import Generation, Prompt, Sampling, askable, generate
from diffing_core.models import ModelPair
from diffing_core.prompts import PromptedSettings
from diffing_core.subject import Subject
from diffing_core.tables import Column, TableSpec
from diffing_core.word_trends import unlikeness, words_of

SHOWN_CHARACTERS = 300
SIDE = Column("side", "string", "base, tuned, or the name of an edited model.", role="key")
LEFT_OUT = Column(
    "left_out", "list<string>", "Tensors and rows of finetunes that the model lacks, since the base has no place for them."
)


class AskedSettings(PromptedSettings):
    """Knobs of the methods that ask edited models and test their words."""

    samples: int = Field(2, ge=1, description="Answers per prompt and model.")
    min_samples: int = Field(3, ge=1, description="Answers of all compared models in which a listed word occurs.")
    max_loss_nats: float = Field(
        2.0, ge=0, description="A model counts if its texts' log p_base per token is at most so far below the tuned model's."
    )
    max_q: float = Field(0.2, gt=0, le=1, description="q-value up to which a word is shown.")
    shown_words: int = Field(40, ge=0, description="Words among the findings.")
    shown_texts: int = Field(5, ge=0, description="Texts among the findings.")
    texts_with_words: bool = Field(False, description="Whether a text is shown only if one of the shown words is in it.")

    def sampling(self) -> Sampling:
        """How every model draws."""
        return Sampling(temperature=self.temperature, max_new_tokens=self.max_new_tokens, n=self.samples)


@dataclass(frozen=True, eq=False)
class Answers:
    """What one model said, and how likely the base finds each answer (nats/token).

    The i-th answers of all models belong together.
    """

    model: str
    made: tuple[Generation, ...]
    words: tuple[tuple[str, ...], ...]
    logprobs: tuple[float | None, ...]

    @property
    def mean_logprob(self) -> float | None:
        """Mean log p_base over all tokens said, nats; None if nothing was said."""
        return mean_over_tokens(self.made, self.logprobs)

    def is_language_beside(self, other: "Answers", max_loss_nats: float) -> bool:
        """Whether the base finds these texts about as likely as the other model's: at most so many nats/token less."""
        if self.mean_logprob is None or other.mean_logprob is None:
            return False
        return self.mean_logprob >= other.mean_logprob - max_loss_nats

    def graded_by(self, base: "Answers") -> list[float | None]:
        """The coherence of each answer, by its place among the base's (coherence.py)."""
        repeated, of_base = ([repeated_share(text) for text in each.words] for each in (self, base))
        return grades(self.logprobs, repeated, base.logprobs, of_base)

    @property
    def texts(self) -> list[str]:
        """The answers as text."""
        return [each.text for each in self.made]


def ask(
    pair: ModelPair,
    models: Iterable[tuple[str, AbstractContextManager[Subject]]],
    prompts: Sequence[Prompt],
    sampling: Sampling,
    seed: int,
) -> list[Answers]:
    """Answers of every model, by prompt and sample; prompts that cannot be asked are passed over.

    All are written by the modules here: another engine draws other texts, and serves no edited model.

    Raises:
        NotComputableError: none of the prompts can be asked.
    """
    asked = askable(prompts, pair.tokenizer)
    answers = []
    for name, running in models:
        with running as subject:
            here = subject.local() if subject.served else subject
            made = generate(here, pair.tokenizer, [prompts[index] for index in asked], sampling=sampling, seed=seed)
        words = tuple(tuple(words_of(each.text)) for each in made)
        answers.append(Answers(name, tuple(made), words, tuple(mean_logprobs(pair.base, made))))
    return answers


def samples_spec(method: str) -> TableSpec:
    """The table of all answers of one method."""
    return TableSpec(
        f"{method}_samples",
        "Every answer of every model; models drew with the same random numbers.",
        ("side", "prompt_index", "sample"),
        (
            SIDE,
            Column("prompt_index", "int32", "Place in the list of prompts, from 0.", role="key"),
            Column("sample", "int32", "Number of the answer, from 0.", role="key"),
            Column("prompt", "string", "User's message, or beginning of the document."),
            Column("kind", "string", "chat or document."),
            Column("text", "string", "The answer. Untrusted."),
            Column("n_tokens", "int32", "Its length, without the token that ends it.", "tokens", "count", low=0),
            Column("finished", "bool", "Whether the model ended it; otherwise it was cut."),
            Column("logprob_base", "float64", "Mean log p_base of its tokens; null if it has none.", "nats/token",
                   nullable=True, high=0),
            Column("repeated_share", "float64", "Share of its word pairs that it already had; null below two words.",
                   nullable=True, low=0, high=1),
            Column("distinct_share", "float64", "Distinct words over words; null without words.", nullable=True, low=0, high=1),
            Column("coherence", "float64", "Share of the base's own answers that are at least as odd, by log p_base and "
                   "repetition; 0: odder than all of them. Null without a token.", nullable=True, low=0, high=1),
            Column("unlikeness", "float64", "How much it is made of words that come with the change; Stouffer's sum.",
                   "z", "effect"),
        ),
    )  # fmt: skip


def samples_table(
    spec: TableSpec, answers: Sequence[Answers], pair: ModelPair, prompts: Sequence[Prompt], z: dict[str, float]
) -> pa.Table:
    """All answers, scored by the base and by the words' z; the first model's are what texts are graded by."""
    asked = askable(prompts, pair.tokenizer)
    rows = []
    for each in answers:
        graded = each.graded_by(answers[0])
        for made, words, logprob, grade in zip(each.made, each.words, each.logprobs, graded, strict=True):
            index = asked[made.prompt_index]
            rows.append(
                {
                    "side": each.model,
                    "prompt_index": index,
                    "sample": made.sample,
                    "prompt": prompts[index].text,
                    "kind": prompts[index].kind,
                    "text": made.text,
                    "n_tokens": made.n_tokens,
                    "finished": made.finished,
                    "logprob_base": logprob,
                    "repeated_share": repeated_share(words),
                    "distinct_share": distinct_share(words),
                    "coherence": grade,
                    "unlikeness": unlikeness(words, z),
                }
            )
    return spec.table({name: [row[name] for row in rows] for name in spec.schema.names})


def coherence_spec(method: str) -> TableSpec:
    """The table of measures of coherence of one method."""
    return TableSpec(
        f"{method}_coherence",
        "Whether what each model says is still language: a row per measure, so that judges are rows too.",
        ("side", "measure"),
        (
            SIDE,
            Column("measure", "string", "coherence, mean_logprob_base, perplexity_base, distinct_1, distinct_2, "
                   "repeated_share, finished_share or mean_tokens.", role="key"),
            Column("value", "float64", "Its value, in the measure's own unit (nats/token, tokens, or a share)."),
            Column("over_base", "float64", "Value − that of the base's own answers; null where the base has none.", "",
                   "effect", nullable=True),
            Column("n_texts", "int32", "Answers that it is computed from.", role="count", low=0),
        ),
    )  # fmt: skip


def coherence_table(spec: TableSpec, answers: Sequence[Answers]) -> pa.Table:
    """Measures of all models; the first one's are what the others are compared with."""
    found = {each.model: measures(each.made, each.words, each.logprobs) for each in answers}
    for each in answers:
        graded = [grade for grade in each.graded_by(answers[0]) if grade is not None]
        if graded:
            found[each.model]["coherence"] = (float(np.mean(graded)), len(graded))
    base = found[answers[0].model]
    rows = [
        (model, measure, value, value - base[measure][0] if measure in base else None, n_texts)
        for model, of_model in found.items()
        for measure, (value, n_texts) in of_model.items()
    ]
    return spec.table(dict(zip(spec.schema.names, map(list, zip(*rows, strict=True)), strict=True)))


def findings_of(
    words: TableSpec, rising: Sequence[dict], samples: TableSpec, table: pa.Table, models: Iterable[str], settings: AskedSettings
) -> list[Finding]:
    """Words that come with the change, then the answers of these models that are most made of such words.

    Args:
        words: the table that `rising` are rows of: word, z, p_value and q_value, what rises most first.
        table: all answers, a table of `samples`.
    """
    rising = rising[: settings.shown_words]
    shown = [
        Finding(
            "token", clean(row["word"], SHOWN_CHARACTERS), row["z"], "z", words.name, {"word": row["word"]},
            p_value=row["p_value"], q_value=row["q_value"],
        )
        for row in rising
    ]  # fmt: skip
    wanted, carrying = set(models), {row["word"] for row in rising}
    texts: dict[str, Finding] = {}
    for row in sorted(table.to_pylist(), key=lambda row: -row["unlikeness"]):
        item = clean(row["text"], SHOWN_CHARACTERS)
        said = row["side"] in wanted and item and row["unlikeness"] > 0
        carries = not settings.texts_with_words or not carrying.isdisjoint(words_of(row["text"]))
        if said and carries and len(texts) < settings.shown_texts:
            key = {name: row[name] for name in samples.grain}
            texts.setdefault(item, Finding("generation", item, row["unlikeness"], "z", samples.name, key))
    return [*shown, *texts.values()]
