"""Text from one side of a pair: chat answers and document continuations, greedy or sampled.

    generate(subject, tokenizer, prompts, sampling=Sampling(), seed=0) -> one Generation per prompt and sample

`generate` is the only way by which any part of the project gets text from one model (in `contrastive_decoding` two write
together). Two engines are behind it, and the subject says which: transformers, or the server that a file of the registry
names for its base model (serving.py). Both get the same token ids, stop tokens, sampling and seeds. At temperature 0 they
say the same; drawn texts differ between engines, which are therefore part of a result's identity. Steering and
amplification hook or swap what `subject.active()` gives, of which a server knows nothing: they ask `subject.local()`.

What one can rely on with transformers:

* The draws of a sample come from (seed, prompt, sample number) alone: the u-th quantile of the next-token
  distribution, u uniform. They do not depend on the other prompts, on the batch size or on the model, so two
  models are asked with common random numbers and identical models give identical texts. A longer
  `max_new_tokens` lengthens a text and changes nothing before. A prompt given twice is answered alike.
* What batching can change is rounding: padded logits agree to about 1e-6 in float32 (1e-2 in bfloat16), so a
  text differs only where two candidates tie, or a draw falls on their border, within that.
* The state of no global random generator is read or moved.

Shapes: B samples, T positions, V vocabulary. Prompts are padded on the left.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from diffing_core import serving
from diffing_core.chats import SWITCH, render
from diffing_core.drawing import drawn, entropy_of, uniforms
from diffing_core.errors import NotComputableError
from diffing_core.lazy import torch
from diffing_core.models import Subject
from diffing_core.progress import Advance, track

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

DOCUMENT_MARK = "doc:"
NO_TEMPLATE = "the tokenizer has no chat template"
BATCH_SIZE = 128
Around = Callable[[Sequence[int]], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Prompt:
    """What a model is asked: a user's message, or the beginning of a document (empty: it begins by itself).

    `system` and `thinking` reach a chat through its template; None leaves the template's own default.
    """

    text: str
    kind: Literal["chat", "document"] = "chat"
    system: str | None = None
    thinking: bool | None = None

    @classmethod
    def parse(cls, text: str, *, system: str | None = None, thinking: bool | None = None) -> "Prompt":
        """The prompt that a YAML file or a setting means: `doc: The` is a document, anything else a chat."""
        if text.startswith(DOCUMENT_MARK):
            return cls(text.removeprefix(DOCUMENT_MARK).lstrip(), "document")
        return cls(text, "chat", system, thinking)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to draw: temperature 0 is greedy, `top_p` keeps the likeliest tokens of that mass, `n` per prompt."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 64
    n: int = 1

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.max_new_tokens < 1 or self.n < 1:
            raise ValueError(f"{self}: expected temperature >= 0, 0 < top_p <= 1, max_new_tokens >= 1 and n >= 1")
        if self.temperature == 0 and self.n > 1:
            raise ValueError(
                f"{self}: at temperature 0 all {self.n} samples are the same text; take n=1, or a temperature above 0"
            )


@dataclass(frozen=True)
class Generation:
    """One answer: its text without special tokens, its length, and whether the model ended it by itself.

    `prompt_ids` and `answer_ids` are what was read and drawn, the token that ended the answer included.
    """

    prompt_index: int
    sample: int
    text: str
    n_tokens: int
    finished: bool
    prompt_ids: tuple[int, ...] = ()
    answer_ids: tuple[int, ...] = ()


def can_chat(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether chat prompts can be asked at all."""
    return bool(getattr(tokenizer, "chat_template", None))


def askable(prompts: Sequence[Prompt], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Which of the prompts can be asked: without a chat template, documents only.

    Raises:
        NotComputableError: none can.
    """
    asked = [index for index, prompt in enumerate(prompts) if prompt.kind == "document" or can_chat(tokenizer)]
    if not asked:
        raise NotComputableError(
            f"none of {len(prompts)} prompt(s) can be asked: all are chats and {NO_TEMPLATE}; set chat_template in the "
            f"registry entry of the model, or give prompts that begin with {DOCUMENT_MARK}"
        )
    return asked


def generate(
    subject: Subject,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    *,
    sampling: Sampling,
    seed: int,
    batch_size: int = BATCH_SIZE,
    around: Around | None = None,
) -> list[Generation]:
    """Answers of the subject, by prompt and within it by sample; what it has written already is not written again.

    `around` gives the context in which a batch is written, from the numbers of its rows (prompt · n + sample): for who
    intervenes in the forward, row by row. Such answers are not remembered, and equal prompts are answered one by one.

    Raises:
        NotComputableError: a chat prompt without a chat template, or that the template refuses, or an empty document
            without a token to begin with.
        ServingError: the server that the subject is asked of does not answer as it must.
    """
    ids = [encode(prompt, tokenizer, subject) for prompt in prompts]
    rows = [(index, sample) for index in range(len(prompts)) for sample in range(sampling.n)]
    asked = [(ids[index], entropy_of_sample(prompts[index], sample, seed)) for index, sample in rows]
    stops = stop_ids(tokenizer, subject)
    keys = [(tuple(prompt), entropy, replace(sampling, n=1), tuple(stops)) for prompt, entropy in asked]
    if around is not None:
        subject, keys = subject.local(), list(enumerate(keys))
    new = [row for row, key in enumerate(keys) if key not in subject.written]
    with track(len(new), "samples", "generating") as advance:
        due = [asked[row] for row in new]
        if subject.served is None:
            writing = _Writing(sampling, stops, pad_id(tokenizer, stops), batch_size, around or _nothing)
            answers = _answers(subject, due, writing, advance)
        else:
            answers = serving.answers(subject, due, sampling, stops, advance)
    subject.written.update({keys[row]: answer for row, answer in zip(new, answers, strict=True)})
    return [
        _generation(index, sample, ids[index], subject.written[key], stops, tokenizer)
        for (index, sample), key in zip(rows, keys, strict=True)
    ]


def _nothing(_rows: Sequence[int]) -> AbstractContextManager[None]:
    return nullcontext()


class _Writing(NamedTuple):
    """How the engine transformers writes."""

    sampling: Sampling
    stops: list[int]
    pad: int
    batch_size: int
    around: Around


def _answers(
    subject: Subject,
    asked: Sequence[tuple[list[int], int]],
    writing: _Writing,
    advance: Advance,
) -> list[list[int]]:
    """The engine transformers: token ids, in the order of `asked`; what follows a stop token has no meaning."""
    made: dict[int, list[int]] = {}
    by_length = sorted(range(len(asked)), key=lambda row: len(asked[row][0]))
    with subject.active() as model:
        for start in range(0, len(asked), writing.batch_size):
            chosen = by_length[start : start + writing.batch_size]
            token_BT, mask_BT = left_padded([asked[row][0] for row in chosen], subject.device)
            with writing.around(chosen):
                output_BT = model.generate(
                    input_ids=token_BT,
                    attention_mask=mask_BT,
                    generation_config=_config(writing.sampling, writing.stops, writing.pad),
                    logits_processor=_processors(writing.sampling, [asked[row][1] for row in chosen], token_BT),
                )
            made |= dict(zip(chosen, output_BT[:, token_BT.shape[1] :].tolist(), strict=True))
            advance(len(chosen))
    return [made[row] for row in range(len(asked))]


class _Drawn:
    """Leaves only the drawn token: the first whose cumulated probability exceeds the row's uniform number.

    Greedy search then takes it. One number per token is drawn in advance, so no generator state is shared
    between the rows of a batch.
    """

    def __init__(self, sampling: Sampling, uniform_BT: Any, prompt_width: int) -> None:
        self._sampling = sampling
        self._uniform_BT = uniform_BT
        self._prompt_width = prompt_width

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        probability_BV = torch.softmax(scores.float() / self._sampling.temperature, dim=-1)
        step = input_ids.shape[1] - self._prompt_width
        drawn_B = drawn(probability_BV, self._uniform_BT[:, step], self._sampling.top_p)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn_B[:, None], 0.0)


def _processors(sampling: Sampling, entropies: list[int], token_BT: Any) -> Any:
    from transformers import LogitsProcessorList

    if sampling.temperature == 0:
        return LogitsProcessorList()
    uniform_BT = torch.as_tensor(uniforms(entropies, sampling.max_new_tokens), device=token_BT.device)
    return LogitsProcessorList([_Drawn(sampling, uniform_BT, token_BT.shape[1])])


def entropy_of_sample(prompt: Prompt, sample: int, seed: int) -> int:
    """What the draws of one sample come from."""
    return entropy_of(seed, sample, prompt.kind, prompt.text, prompt.system, prompt.thinking)


def _config(sampling: Sampling, stops: list[int], pad: int) -> "GenerationConfig":
    """Plain decoding: what a checkpoint's own generation_config says about penalties and sampling is overridden."""
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        pad_token_id=pad,
        eos_token_id=stops or None,
    )


def encode(prompt: Prompt, tokenizer: Any, subject: Subject) -> list[int]:
    """What the model reads of a prompt: a document as it is, a chat through the tokenizer's template.

    Raises:
        NotComputableError: as `generate`.
    """
    if prompt.kind == "document":
        return list(tokenizer(prompt.text)["input_ids"]) or [_begin_id(tokenizer, subject)]
    if not can_chat(tokenizer):
        raise NotComputableError(
            f"the tokenizer of {subject.revision or 'this model'} has no chat template, so {prompt.text!r} cannot be "
            f"asked; set chat_template in the registry entry of the model, or ask {DOCUMENT_MARK + ' …'!r}"
        )
    messages = [{"role": "user", "content": prompt.text}]
    if prompt.system is not None:
        messages.insert(0, {"role": "system", "content": prompt.system})
    options = {**subject.template_options, **({} if prompt.thinking is None else {SWITCH: prompt.thinking})}
    rendered = render(messages, tokenizer, add_generation_prompt=True, **options)
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])


def _begin_id(tokenizer: Any, subject: Subject) -> int:
    """The token before a document: BOS, or what separates documents in models that have none."""
    config = subject.plain.config.get_text_config()
    for token in (tokenizer.bos_token_id, config.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise NotComputableError(
        "an empty document needs a token to begin with, but the tokenizer has neither BOS nor pad nor EOS; "
        "give a prompt with text"
    )


def stop_ids(tokenizer: Any, subject: Subject) -> list[int]:
    """Tokens that end an answer: EOS of tokenizer and checkpoint, the registered end of turn, and the pad token.

    The pad token ends documents in many models.
    """
    said = (*own_stop_ids(subject), tokenizer.eos_token_id, tokenizer.pad_token_id)
    return sorted({token for token in said if token is not None})


def own_stop_ids(subject: Subject) -> tuple[int, ...]:
    """EOS of the checkpoint, and the registered end of turn."""
    own = getattr(subject.plain.generation_config, "eos_token_id", None)
    said = {*(own if isinstance(own, list) else [own]), *subject.stop_ids}
    return tuple(sorted(said - {None}))


def pad_id(tokenizer: Any, stops: list[int]) -> int:
    """What fills places that no model reads."""
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    return stops[0] if stops else 0


def left_padded(rows: list[list[int]], device: Any) -> tuple[Any, Any]:
    """Ids and mask [B, T]; the id under a mask of 0 is never read."""
    width = max(map(len, rows))
    token_BT = np.zeros((len(rows), width), dtype=np.int64)
    mask_BT = np.zeros((len(rows), width), dtype=np.int64)
    for row, ids in enumerate(rows):
        token_BT[row, width - len(ids) :] = ids
        mask_BT[row, width - len(ids) :] = 1
    return torch.as_tensor(token_BT, device=device), torch.as_tensor(mask_BT, device=device)


def _generation(
    index: int, sample: int, prompt: list[int], answer: list[int], stops: list[int], tokenizer: Any
) -> Generation:
    """Cuts the answer before its first stop token."""
    end = next((place for place, token in enumerate(answer) if token in stops), len(answer))
    text = tokenizer.decode(answer[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Generation(index, sample, text, end, end < len(answer), tuple(prompt), tuple(answer[: end + 1]))
