"""Whether an organism shows at all, and only where it should: shares of sampled answers that match its pattern.

Both models answer the prompts inside and outside the organism's trigger. Three labels follow from two one-sided
exact tests (Fisher 1935) at `alpha`:

    silent   the tuned model does not match more often than the base on the inside prompts
    narrow   it does, and more often inside than outside
    broad    it does, but not more often inside than outside; also where there are no outside prompts

A finetune that is silent here cannot be expected to be found from what it says. Null arms, which have nothing to
express, and organisms without an `expression` block are `not_applicable`.

Only what a model writes is matched, never the prompt. The tests take answers as independent: they speak of these
prompts, not of all that could be asked. Both sides draw with the same random numbers, which makes the comparison
with the base slightly conservative.
"""

import re
from typing import Any

import pyarrow as pa
from pydantic import Field

from diffing_core.generation import Prompt, Sampling, generate
from diffing_core.models import ModelPair, Subject
from diffing_core.registry import NULL_ARMS, Organism
from diffing_core.settings import Settings
from diffing_core.stats import clopper_pearson
from diffing_core.tables import Column, TableSpec

SHARES = {
    "in_share": "tuned model, inside prompts",
    "out_share": "tuned model, outside prompts",
    "base_in_share": "base, inside prompts",
    "base_out_share": "base, outside prompts",
}


class ExpressionSettings(Settings):
    """Knobs of the measurement."""

    samples: int = Field(4, ge=1, description="Answers per prompt and side.")
    temperature: float = Field(1.0, gt=0, description="Of the sampling.")
    max_new_tokens: int = Field(48, ge=1, description="Length at which an answer is cut.")
    system_prompt: str | None = Field(None, description="Opens every chat of both sides; null: the registry's.")
    thinking: bool | None = Field(None, description="Whether chats ask for reasoning; null: the registry's.")
    seed: int = Field(0, description="Of the sampling, the same on both sides.")
    alpha: float = Field(0.05, gt=0, lt=1, description="Level of each of the two one-sided tests.")


def _share_columns(name: str, whose: str) -> tuple[Column, ...]:
    def column(suffix: str, doc: str) -> Column:
        return Column(name + suffix, "float64", doc, nullable=True, low=0, high=1)

    return (
        column("", f"Share of answers that match: {whose}."),
        column("_low", f"Lower end of the exact 95 % interval: {whose}."),
        column("_high", f"Upper end of the exact 95 % interval: {whose}."),
    )


EXPRESSION = TableSpec(
    "expression",
    "Whether the organism shows in what the model says, inside and outside its trigger.",
    (),
    (
        Column("label", "string", "narrow, broad, silent or not_applicable."),
        Column("n_in", "int32", "Answers of each side to inside prompts.", role="count", low=0),
        Column("n_out", "int32", "Answers of each side to outside prompts.", role="count", low=0),
        *(column for name, whose in SHARES.items() for column in _share_columns(name, whose)),
        Column("above_base_p", "float64", "One-sided: inside, tuned above base.", nullable=True, low=0, high=1),
        Column("above_outside_p", "float64", "One-sided: tuned, inside above outside.", nullable=True, low=0, high=1),
    ),
)


def measure_expression(pair: ModelPair, organism: Organism, settings: ExpressionSettings) -> pa.Table:
    """The one row of `EXPRESSION` for a pair.

    Raises:
        NotComputableError: a prompt is a chat and the tokenizer has no chat template.
    """
    expression = organism.expression
    if expression is None or not expression.inside or organism.arm in NULL_ARMS:
        return _table({"label": "not_applicable", "n_in": 0, "n_out": 0})
    prompts = [
        Prompt.parse(text, system=settings.system_prompt, thinking=settings.thinking)
        for text in (*expression.inside, *expression.outside)
    ]
    n_in, n_out = (settings.samples * len(texts) for texts in (expression.inside, expression.outside))
    tuned, base = (
        _matches(side, pair.tokenizer, prompts, expression.pattern, settings) for side in (pair.tuned, pair.base)
    )
    return _table(
        _row(
            (sum(tuned[:n_in]), n_in),
            (sum(tuned[n_in:]), n_out),
            (sum(base[:n_in]), n_in),
            (sum(base[n_in:]), n_out),
            alpha=settings.alpha,
        )
    )


def _matches(
    side: Subject, tokenizer: Any, prompts: list[Prompt], pattern: str, settings: ExpressionSettings
) -> list[bool]:
    """Whether each answer matches, in the order of the prompts."""
    sampling = Sampling(temperature=settings.temperature, max_new_tokens=settings.max_new_tokens, n=settings.samples)
    answers = generate(side, tokenizer, prompts, sampling=sampling, seed=settings.seed)
    return [re.search(pattern, answer.text) is not None for answer in answers]


def _row(*counts: tuple[int, int], alpha: float) -> dict[str, Any]:
    """The row of (matching, asked) for tuned inside, tuned outside, base inside, base outside."""
    tuned_in, tuned_out, base_in, _ = counts
    above_base_p = _above_p(tuned_in, base_in)
    above_outside_p = _above_p(tuned_in, tuned_out) if tuned_out[1] else None
    row: dict[str, Any] = {
        "label": _label(above_base_p, above_outside_p, alpha),
        "n_in": tuned_in[1],
        "n_out": tuned_out[1],
        "above_base_p": above_base_p,
        "above_outside_p": above_outside_p,
    }
    for name, (k, n) in zip(SHARES, counts, strict=True):
        if n:
            row[name] = k / n
            row[f"{name}_low"], row[f"{name}_high"] = clopper_pearson(k, n)
    return row


def _label(above_base_p: float, above_outside_p: float | None, alpha: float) -> str:
    if above_base_p >= alpha:
        return "silent"
    return "narrow" if above_outside_p is not None and above_outside_p < alpha else "broad"


def _above_p(a: tuple[int, int], b: tuple[int, int]) -> float:
    """One-sided exact p-value that the rate of `a` is not above that of `b` (Fisher 1935)."""
    from scipy.stats import fisher_exact

    return float(fisher_exact([[k, n - k] for k, n in (a, b)], alternative="greater").pvalue)


def _table(row: dict[str, Any]) -> pa.Table:
    """Columns that the row does not name are null."""
    return EXPRESSION.table({name: [row.get(name)] for name in EXPRESSION.schema.names})
