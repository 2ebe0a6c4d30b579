"""Chats as a model's template writes them, with every token told as somebody's words or as the template's."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffing_core.errors import NotComputableError

ROLES = ("text", "system", "user", "assistant", "tool")
Message = Mapping[str, str]
_MARK = "\ue000{}\ue001"  # of the private use area: no template has them
_MARKED = re.compile(_MARK.format(r"(\d+)"))


def render(messages: Sequence[Message], tokenizer: Any, **options: Any) -> str:
    """The chat as text; `options` go to the template.

    Raises:
        NotComputableError: the template refuses these messages.
    """
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise NotComputableError(f"the chat template refuses a chat of {roles}: {error}") from error


def check_messages(record: Any) -> list[Message]:
    """The record, if it is a list of messages, each with a known role and a text.

    Raises:
        NotComputableError: it is something else.
    """
    if not isinstance(record, list) or not record:
        found = "no message" if record == [] else f"a {type(record).__name__}"
        raise NotComputableError(f"found {found} where a list of messages is expected")
    for message in record:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise NotComputableError("a message needs role and content as text")
        if message["role"] not in ROLES:
            raise NotComputableError(f"a message is of unknown role {message['role']!r}; known are {ROLES[1:]}")
    return record


def first_exchange(messages: list[Message]) -> list[Message]:
    """Everything up to the first answer."""
    roles = [message["role"] for message in messages]
    return messages[: roles.index("assistant") + 1] if "assistant" in roles else messages


def encode(messages: list[Message], tokenizer: Any, **options: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids, roles and template flags [T] of a chat.

    It is rendered, and once more with marks for contents: what is not content is template. A template
    token takes the role of the message that follows it; those at the end, of the last one.

    Raises:
        NotComputableError: the template refuses the messages, or changes what they say.
    """
    rendered = render(messages, tokenizer, **options)
    marked = [
        {**message, "content": _MARK.format(number)} if message["content"].strip() else message
        for number, message in enumerate(messages)
    ]
    spans = _content_spans(rendered, render(marked, tokenizer, **options), messages)
    encoded = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
    token_T = np.asarray(encoded["input_ids"], dtype=np.int32)
    starts = np.asarray([start for start, _ in encoded["offset_mapping"]])
    role_T = np.zeros(len(token_T), np.int8)
    template_T = np.ones(len(token_T), bool)
    cursor = 0
    for message, (begin, end) in zip(messages, spans, strict=True):
        role_T[starts >= cursor] = ROLES.index(message["role"])
        template_T[(starts >= begin) & (starts < end)] = False
        cursor = end
    return token_T, role_T, template_T


def _content_spans(rendered: str, marked: str, messages: Sequence[Message]) -> list[tuple[int, int]]:
    """Begin and end of each content in the rendered chat; a blank one is empty, at the end of the one before."""
    opening, *rest = _MARKED.split(marked)
    after = dict(zip(map(int, rest[::2]), rest[1::2], strict=True))
    cursor = len(opening) if rendered.startswith(opening) else -1
    spans: list[tuple[int, int]] = []
    for number, message in enumerate(messages):
        said = message["content"]
        if not said.strip():
            end = spans[-1][1] if spans else 0
            spans.append((end, end))
            continue
        forms = (said, said.strip(), said.lstrip(), said.rstrip())
        following = after.get(number, _MARK)
        form = next((form for form in forms if cursor >= 0 and rendered.startswith(form + following, cursor)), None)
        if form is None:
            raise NotComputableError(
                f"the chat template changes the text of a {message['role']} message, so its tokens cannot be told "
                "from the template's; give a template that keeps contents as they are"
            )
        spans.append((cursor, cursor + len(form)))
        cursor += len(form) + len(following)
    return spans
