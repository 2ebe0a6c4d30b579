"""What a direction does when it is added to the residual stream: texts with it and without it, side by side.

    h ← h + strength · mean‖h‖ · v/‖v‖        at the output of one block, at every position, prompt and answer alike

Strengths are multiples of the mean norm of the base's residual stream at that block, so that methods and models can be
compared. Steered and plain text are drawn with the same random numbers. Large strengths break the language: how likely
the base finds a text stands beside it.

Reference: Turner et al. 2023, https://arxiv.org/abs/2308.10248.

Shapes: M directions, D model width, B rows of a batch.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from diffing_core.coherence import mean_logprobs
from diffing_core.generation import Prompt, Sampling, generate
from diffing_core.interventions import edited_residual
from diffing_core.lazy import torch
from diffing_core.models import ModelPair
from diffing_core.settings import Settings
from diffing_core.tables import Column, TableSpec

PROMPTS = ("Tell me something.", "doc: The")


class SteeringSettings(Settings):
    """Knobs of steering; a method that steers inherits them."""

    steered: int = Field(4, ge=0, description="Directions that are steered with, the leading ones; 0 for none.")
    steered_side: Literal["base", "tuned"] = Field("base", description="The model that is steered.")
    steering_strengths: tuple[float, ...] = Field((0.5, 1.0), description="Multiples of the mean norm of the residual stream.")
    steering_prompts: tuple[str, ...] = Field(PROMPTS, description="Chat messages; `doc: …` begins a document.")
    steering_samples: int = Field(1, ge=1, description="Texts per direction, strength and prompt.")
    steering_tokens: int = Field(24, ge=1, description="Length at which a text is cut.")
    steering_temperature: float = Field(1.0, gt=0, description="Of the sampling.")
    steering_seed: int = Field(0, description="Of the sampling.")


def steering_spec(name: str, groups: tuple[Column, ...]) -> TableSpec:
    """The table; `groups` are the key columns that tell directions apart."""
    return TableSpec(
        name,
        "Texts written while a direction was added to the residual stream, beside those written without it.",
        (*(column.name for column in groups), "strength", "prompt_index", "sample"),
        (
            *groups,
            Column("strength", "float64", "Added multiple of the mean norm of the residual stream.", role="key"),
            Column("prompt_index", "int32", "Place in the list of prompts, from 0.", role="key", low=0),
            Column("sample", "int32", "Number of the text, from 0.", role="key", low=0),
            Column("side", "string", "The model that was steered."),
            Column("prompt", "string", "User's message, or beginning of the document."),
            Column("text", "string", "What the steered model wrote. Untrusted."),
            Column("plain_text", "string", "What it wrote unsteered, with the same random numbers. Untrusted."),
            Column("logprob_base", "float64", "Mean log p_base of the steered text's tokens; null if it has none.", "nats/token",
                   nullable=True, high=0),
            Column("plain_logprob_base", "float64", "The same of the unsteered text.", "nats/token", nullable=True, high=0),
        ),
    )  # fmt: skip


def steering_table(
    spec: TableSpec,
    pair: ModelPair,
    vector_MD: np.ndarray,
    at_M: Sequence[tuple[int, float]],
    groups: Mapping[str, Sequence[Any]],
    settings: SteeringSettings,
) -> pa.Table:
    """The table for M directions; `at_M` is (layer, mean norm there) of each, `groups` its value of each key column.

    All directions of a layer are written in the same batches. A direction of zeros has no rows, and where no prompt can be
    asked the table is empty.
    """
    prompts = [Prompt.parse(text) for text in settings.steering_prompts]
    prompts = [prompt for prompt in prompts if prompt.kind == "document" or pair.tokenizer.chat_template]
    rows = np.flatnonzero(vector_MD.any(1)) if prompts else np.arange(0)
    columns: dict[str, list[Any]] = {name: [] for name in spec.schema.names}
    for layer in sorted({at_M[row][0] for row in rows}):
        here = [row for row in rows if at_M[row][0] == layer]
        keys = [{name: values[row] for name, values in groups.items()} for row in here]
        unit_XD = vector_MD[here] / np.linalg.norm(vector_MD[here], axis=1, keepdims=True)
        scaled_XD = unit_XD * np.asarray([at_M[row][1] for row in here])[:, None]
        for row in _steered(pair, layer, scaled_XD.astype(np.float32), prompts, settings):
            found = keys[row.pop("direction")] | row
            for name, values in columns.items():
                values.append(found[name])
    return spec.table(columns)


def _steered(
    pair: ModelPair, layer: int, scaled_XD: np.ndarray, prompts: Sequence[Prompt], settings: SteeringSettings
) -> list[dict[str, Any]]:
    subject = getattr(pair, settings.steered_side).local()
    sampling = Sampling(
        temperature=settings.steering_temperature, max_new_tokens=settings.steering_tokens, n=settings.steering_samples
    )
    cases = [(x, strength) for x in range(len(scaled_XD)) for strength in settings.steering_strengths]
    added_CD = torch.from_numpy(np.stack([strength * scaled_XD[x] for x, strength in cases]).astype(np.float32))
    rows_per_case = len(prompts) * sampling.n

    def around(rows: Sequence[int]) -> AbstractContextManager[None]:
        added_B1D = added_CD[[row // rows_per_case for row in rows], None].to(subject.device, subject.dtype)
        return edited_residual(subject, layer, lambda hidden_BTD: hidden_BTD + added_B1D)

    plain = generate(subject, pair.tokenizer, prompts, sampling=sampling, seed=settings.steering_seed)
    made = generate(
        subject, pair.tokenizer, [*prompts] * len(cases), sampling=sampling, seed=settings.steering_seed, around=around
    )
    logprobs, plain_logprobs = mean_logprobs(pair.base, made), mean_logprobs(pair.base, plain)
    found = []
    for row, (text, logprob) in enumerate(zip(made, logprobs, strict=True)):
        (x, strength), within = cases[row // rows_per_case], row % rows_per_case
        found.append(
            {
                "direction": x,
                "strength": strength,
                "prompt_index": within // sampling.n,
                "sample": text.sample,
                "side": settings.steered_side,
                "prompt": prompts[within // sampling.n].text,
                "text": text.text,
                "plain_text": plain[within].text,
                "logprob_base": logprob,
                "plain_logprob_base": plain_logprobs[within],
            }
        )
    return found
