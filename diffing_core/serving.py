"""The second engine of `generate`: a server of the OpenAI completions protocol that tells token ids, as vLLM does.

Token ids go there and token ids come back; template, tokenizer and text of the server are never used. An answer is
refused unless it was made of the prompt that was sent, every id is one of the model's, and it ends with a stop token
or at the length asked for. Of the longest answer of every call the server's log-probs must be those of the weights
loaded here, which a wrong model, a wrong adapter, or a side that was edited in memory fails:

    mean over its tokens of |log p_server − log p_here| <= TOLERANCE_NATS

The server draws with its own generator, seeded per prompt and sample alike for both sides of a pair.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field, ValidationError

from diffing_core.agents.words import clean
from diffing_core.errors import ServingError
from diffing_core.lazy import torch
from diffing_core.registry.schema import Server

if TYPE_CHECKING:
    from openai import OpenAI

    from diffing_core.generation import Sampling
    from diffing_core.subject import Subject

TOLERANCE_NATS = {"float32": 0.02, "other": 0.2}  # between two implementations of one model, by number format
SHOWN_CHARACTERS = 300
_SEEDS = 2**63 - 1


@dataclass(frozen=True)
class Served:
    """Under which name a server has one side of a pair, and the adapter that it loads if it has none of that name."""

    server: Server = field(hash=False)
    name: str | None
    folder: Path | None = None


class _Logprobs(BaseModel):
    token_logprobs: list[float]


class _Answer(BaseModel):
    prompt_token_ids: list[int]
    token_ids: list[int]
    logprobs: _Logprobs


class _Answers(BaseModel):
    choices: list[_Answer] = Field(min_length=1, max_length=1)


def answers(
    subject: "Subject",
    asked: Sequence[tuple[list[int], int]],
    sampling: "Sampling",
    stops: Sequence[int],
    advance: Callable[[int], None],
) -> list[list[int]]:
    """Token ids of the answers to prompts given as token ids, each with the number that its seed comes from.

    Raises:
        ServingError: no answer after all retries, a refusal, or an answer that must not be used.
    """
    served = subject.served
    made: list[_Answer] = []
    with _client(served.server) as client:
        _have(client, served)

        def answer(one: tuple[list[int], int]) -> _Answer:
            found = _complete(client, served, one, sampling, stops)
            _check(found, one[0], subject, sampling, stops)
            return found

        pool = ThreadPoolExecutor(served.server.parallel_requests)
        try:
            for found in pool.map(answer, asked):
                made.append(found)
                advance(1)
        finally:
            pool.shutdown(cancel_futures=True)
    if made:
        _check_weights(subject, max(made, key=lambda each: len(each.token_ids)))
    return [each.token_ids for each in made]


@contextmanager
def _client(server: Server) -> Iterator["OpenAI"]:
    """A client that asks again, waiting longer each time, where the server is busy, broken or slow."""
    from openai import OpenAI

    key = os.environ.get(server.api_key_variable, "") if server.api_key_variable else "none"
    if not key:
        raise ServingError(
            f"the server of model {server.name} wants a key, but {server.api_key_variable} is not set; export it"
        )
    with OpenAI(base_url=server.url, api_key=key, timeout=server.timeout_s, max_retries=server.retries) as client:
        yield client


def _have(client: "OpenAI", served: Served) -> None:
    """The server has the model, or loads the adapter now."""
    import httpx

    server = served.server
    if served.name is None:
        raise ServingError(
            f"{server.url} can load adapters but no checkpoints: serve it too and write its source and its name under "
            f"`names` in servers/{server.name}.yaml, or remove that file to use transformers"
        )
    if served.name in _names(client, server):
        return
    if served.folder is not None:
        body = {"lora_name": served.name, "lora_path": str(served.folder)}
        with _told(server, f"load adapter {served.folder}, which it must see under that path"):
            client.post("/load_lora_adapter", cast_to=httpx.Response, body=body)
    names = _names(client, server)
    if served.name not in names:
        raise ServingError(
            f"{server.url} has no model {served.name!r} but {', '.join(names) or 'none'}; mend served_name or names "
            f"in servers/{server.name}.yaml"
        )


def _names(client: "OpenAI", server: Server) -> list[str]:
    with _told(server, "list its models"):
        return [clean(str(model.id), SHOWN_CHARACTERS) for model in client.models.list()]


def _complete(
    client: "OpenAI", served: Served, one: tuple[list[int], int], sampling: "Sampling", stops: Sequence[int]
) -> _Answer:
    """One sample; what a checkpoint's generation_config says of penalties and sampling is overridden."""
    prompt, entropy = one
    with _told(served.server, f"complete {len(prompt)} tokens by {sampling.max_new_tokens} with {served.name}"):
        answer = client.completions.with_raw_response.create(
            model=served.name,
            prompt=prompt,
            seed=entropy & _SEEDS,
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            presence_penalty=0,
            frequency_penalty=0,
            logprobs=0,
            extra_body={
                "return_token_ids": True,
                "stop_token_ids": list(stops),
                "ignore_eos": True,  # it is among the stops
                "top_k": -1,
                "min_p": 0,
                "repetition_penalty": 1,
            },
        )
    try:
        return _Answers.model_validate_json(answer.content).choices[0]
    except ValidationError as error:
        [first, *_] = error.errors(include_input=False, include_url=False)
        place = ".".join(map(str, first["loc"]))
        raise ServingError(
            f"{served.server.url} answered without what is needed ({place}: {first['msg']}); expected one choice with "
            "token_ids, prompt_token_ids and logprobs, as vLLM gives for return_token_ids"
        ) from error


@contextmanager
def _told(server: Server, what: str) -> Iterator[None]:
    """Says in one sentence why the server did not do it."""
    from openai import APIConnectionError, APIStatusError

    try:
        yield
    except APIStatusError as error:
        said = clean(error.message, SHOWN_CHARACTERS)
        tries = f" in {server.retries + 1} tries" if error.status_code >= 500 else ""
        raise ServingError(f"{server.url} did not {what}{tries}: {error.status_code}, {said}") from error
    except APIConnectionError as error:
        raise ServingError(
            f"{server.url} did not {what}: {clean(str(error), SHOWN_CHARACTERS)} {server.retries + 1} tries, "
            f"{server.timeout_s:g} s each. Start the server, or remove servers/{server.name}.yaml to use transformers"
        ) from error


def _check(answer: _Answer, prompt: list[int], subject: "Subject", sampling: "Sampling", stops: Sequence[int]) -> None:
    """Exactly these tokens, or none."""
    ids, wrong = answer.token_ids, ""
    if answer.prompt_token_ids != prompt:
        wrong = "was made of another prompt than the one sent"
    elif not ids or not all(0 <= token < subject.vocab_size for token in ids):
        wrong = f"is empty or has a token outside of 0 … {subject.vocab_size - 1}"
    elif len(answer.logprobs.token_logprobs) != len(ids):
        wrong = f"has {len(ids)} tokens and {len(answer.logprobs.token_logprobs)} log-probs"
    elif set(ids[:-1]) & set(stops) or (ids[-1] not in stops and len(ids) != sampling.max_new_tokens):
        wrong = f"of {len(ids)} tokens ends neither at its first stop token nor at {sampling.max_new_tokens} tokens"
    if wrong:
        raise ServingError(f"an answer of {subject.served.server.url} {wrong}; it is refused. Serve with vLLM 0.10 or newer")


def _check_weights(subject: "Subject", answer: _Answer) -> None:
    """The server's log-probs of an answer are those of the weights here, within the rounding of the number format."""
    said = torch.as_tensor(answer.token_ids, device=subject.device)
    token_BT = torch.as_tensor([answer.prompt_token_ids + answer.token_ids], device=subject.device)
    with subject.active() as model:
        logits_BTV = model(input_ids=token_BT, attention_mask=torch.ones_like(token_BT), use_cache=False).logits
    own_NV = logits_BTV[0, -len(said) - 1 : -1].float().log_softmax(-1)
    theirs_N = torch.as_tensor(answer.logprobs.token_logprobs, device=subject.device)
    error = (own_NV.gather(1, said[:, None])[:, 0] - theirs_N).abs().mean().item()
    limit = TOLERANCE_NATS["float32" if subject.dtype == torch.float32 else "other"]
    if not error <= limit:
        raise ServingError(
            f"{subject.served.server.url} gives its own answer as {subject.served.name} log-probs that are "
            f"{error:.2g} nats per token off those of {subject.revision or 'the model'} here (at most {limit} is "
            "rounding): it serves other weights, in another number format, or they were edited here. Mend "
            f"servers/{subject.served.server.name}.yaml; for a side that is edited in memory ask subject.local()"
        )


def engine_of(subject: Any) -> str:
    """What writes the subject's texts, as it enters the identity of results; transformers has no mark."""
    return "" if subject.served is None else "+served"
