"""The texts of all arms: both models write together in both directions, and the base with a random change beside it."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from diffing_core.generation import Prompt, encode, entropy_of_sample, pad_id, stop_ids
from diffing_core.methods.base import Inputs, Need
from diffing_core.methods.contrastive_decoding.declaration import DIRECTIONS, RANDOM, ContrastiveDecodingSettings
from diffing_core.methods.contrastive_decoding.decoding import Arm, Drawing, Text, decode
from diffing_core.models import ModelPair
from diffing_core.weight_edits import Term, edited_subject

Written = dict[Arm, list[dict[str, Any]]]


def written(inputs: Inputs, settings: ContrastiveDecodingSettings) -> Written:
    """Rows of `SAMPLES`, by beginning and within it by sample, of every arm.

    Raises:
        NotComputableError: a beginning is empty and there is no token to begin with.
    """
    pair: ModelPair = inputs[Need.MODELS]
    arms = [Arm(direction, float(alpha)) for alpha in (0, *settings.alphas) for direction in DIRECTIONS]
    rows = _rows_of(pair, pair.tuned, arms, settings)
    if settings.random_arm:
        turned = Term(inputs[Need.WEIGHTS], turn_seed=settings.seed)
        arm = Arm("tuned", settings.shown_alpha)
        with edited_subject(pair, turned) as subject:
            found = _rows_of(pair, subject, [arm], settings)[arm]
        rows[replace(arm, direction=RANDOM)] = [row | {"direction": RANDOM} for row in found]
    return rows


def _rows_of(pair: ModelPair, tuned: Any, arms: Sequence[Arm], settings: ContrastiveDecodingSettings) -> Written:
    """What the arms say with `tuned` in the tuned model's place; whatever ends a text of the pair ends it."""
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
    texts = iter(decode(replace(pair, tuned=tuned), rows, drawing, stops, pad_id(pair.tokenizer, stops)))
    return {arm: list(_said(asked, texts, arm, stops, pair.tokenizer, settings)) for arm in arms}


def _said(
    asked: Sequence[tuple[int, int]],
    texts: Iterator[Text],
    arm: Arm,
    stops: Sequence[int],
    tokenizer: Any,
    settings: ContrastiveDecodingSettings,
) -> Iterator[dict[str, Any]]:
    for index, sample in asked:
        text = next(texts)
        finished = text.token_ids[-1] in stops
        ids = text.token_ids[: len(text.token_ids) - finished]
        yield {
            "prefill_index": index,
            "prefill": settings.prefills[index],
            "sample": sample,
            **vars(arm),
            "text": tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
            "n_tokens": len(ids),
            "finished": finished,
            "logprob_tuned_nats": text.logprob_tuned_nats,
            "logprob_base_nats": text.logprob_base_nats,
            "log_ratio_nats": text.logprob_tuned_nats - text.logprob_base_nats,
        }
