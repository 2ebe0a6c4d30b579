"""Chats as a model's template writes them, with every token told as somebody's words or as the template's.

Reasoning stands in an answer's `content`, up to `</think>`, or in a field of its own. It is the speaker's own text wherever
the template writes it out (many leave out that of earlier turns); the tags around it, with their line breaks, are template.
`enable_thinking` false leaves it out of the chat, so that tokens are those of a model that is asked not to think; true and
None keep it. A chat that ends with a question is written as the model is asked it, up to where its answer begins.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from diffing_core.errors import NotComputableError

ROLES = ("text", "system", "user", "assistant", "tool")
Message = Mapping[str, str]
SWITCH = "enable_thinking"  # what chat templates call it
_REASONING = ("reasoning_content", "thinking")
_END = "</think>"
_TAG = re.compile(r"(\n*</?think>\n*)")
_MARK = "\ue000{}\ue001"  # of the private use area: no template has them
_HALF = re.compile("[\ud800-\udfff]")
_MARKED = re.compile(_MARK.format(r"(\d+)"))


def render(messages: Sequence[Message], tokenizer: Any, **options: Any) -> str:
    """The chat as text; `options` go to the template. `date_string` is today, for templates that ask the clock too.

    Raises:
        NotComputableError: the template refuses these messages, or prints today's date and no option says which.
    """
    from jinja2 import TemplateError

    def strftime_now(_format: str) -> str:
        if "date_string" not in options:
            raise TemplateError(
                "it prints today's date, which would make other tokens of the same chat every day; write "
                "template_options: {date_string: 26 Jul 2024} in the registry entry of the model"
            )
        return options["date_string"]

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, strftime_now=strftime_now, **options)
    except (TemplateError, TypeError) as error:  # a template may add up what is no text
        roles = ", ".join(message["role"] for message in messages)
        raise NotComputableError(f"the chat template refuses a chat of {roles}: {error}") from error


def check_whole(text: str) -> str:
    """The text, if it has an encoding.

    Raises:
        NotComputableError: it holds half a character, as JSON may and no tokenizer takes.
    """
    if _HALF.search(text):
        raise NotComputableError("found half a character (a lone surrogate) where text is expected")
    return text


def check_messages(record: Any) -> list[Message]:
    """The messages of a record, if it is a list of them, each with a known role and a text.

    Fields that are null are left out: files of columns have every field in every message.

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
    return [{key: value for key, value in message.items() if value is not None} for message in record]


def first_exchange(messages: list[Message]) -> list[Message]:
    """Everything up to the first answer."""
    roles = [message["role"] for message in messages]
    return messages[: roles.index("assistant") + 1] if "assistant" in roles else messages


class _Part(NamedTuple):
    """Text that somebody says; reasoning `may_go`."""

    role: str
    said: str
    may_go: bool


def encode(messages: list[Message], tokenizer: Any, **options: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids, roles and template flags [T] of a chat.

    It is rendered, and once more with marks for what is said: all else is template. A template token takes the
    role of the message that follows it; those at the end, of the last one, or of the answer that a question waits for.

    Raises:
        NotComputableError: the template refuses the messages, or changes what they say.
    """
    asked, options = _asked(messages, options)
    rendered = check_whole(render(asked, tokenizer, **options))
    parts, marked = _marked(asked)
    spans = _spans(rendered, render(marked, tokenizer, **options), parts)
    encoded = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
    token_T = np.asarray(encoded["input_ids"], dtype=np.int32)
    starts = np.asarray([start for start, _ in encoded["offset_mapping"]])
    role_T = np.zeros(len(token_T), np.int8)
    template_T = np.ones(len(token_T), bool)
    cursor = 0
    for role, begin, end in spans:
        role_T[starts >= cursor] = ROLES.index(role)
        template_T[(starts >= begin) & (starts < end)] = False
        cursor = end
    last = "assistant" if options["add_generation_prompt"] else asked[-1]["role"]
    role_T[starts >= cursor] = ROLES.index(last)
    return token_T, role_T, template_T


def heeds_thinking(messages: list[Message], tokenizer: Any, **options: Any) -> bool:
    """Whether the chat is written differently with `enable_thinking` on and off.

    Raises:
        NotComputableError: the template refuses the messages.
    """
    switched = [_asked(messages, {**options, SWITCH: flag}) for flag in (True, False)]
    on, off = (render(asked, tokenizer, **own) for asked, own in switched)
    return on != off


def _asked(messages: list[Message], options: Mapping[str, Any]) -> tuple[list[Message], dict[str, Any]]:
    """What the template is given: the messages, without reasoning if they are to have none, and its options."""
    if options.get(SWITCH) is False:
        messages = [_unreasoned(message) for message in messages]
    return messages, {**options, "add_generation_prompt": messages[-1]["role"] in ("user", "tool")}


def _unreasoned(message: Message) -> Message:
    if message["role"] != "assistant":
        return message
    kept = {key: value for key, value in message.items() if key not in _REASONING}
    _, tag, answer = message["content"].rpartition(_END)
    return {**kept, "content": answer.lstrip("\n") if tag else answer}


def _marked(messages: Sequence[Message]) -> tuple[list[_Part], list[Message]]:
    """All that is said, part by part, and the messages with the number of each part in its place."""
    parts: list[_Part] = []

    def mark(said: str, role: str, *, may_go: bool = False) -> str:
        if not said.strip():
            return said
        parts.append(_Part(role, said, may_go))
        return _MARK.format(len(parts) - 1)

    marked: list[Message] = []
    for message in messages:
        role, content, reasoning = message["role"], message["content"], {}
        if role != "assistant":
            marked.append({**message, "content": mark(content, role)})
            continue
        for key in _REASONING:
            if isinstance(message.get(key), str):
                reasoning[key] = mark(message[key], role, may_go=True)
        *pieces, answer = _TAG.split(content) if _END in content else [content]
        before = [piece if number % 2 else mark(piece, role, may_go=True) for number, piece in enumerate(pieces)]
        marked.append({**message, **reasoning, "content": "".join(before) + mark(answer, role)})
    return parts, marked


def _spans(rendered: str, marked: str, parts: Sequence[_Part]) -> list[tuple[str, int, int]]:
    """Role, begin and end of each part in the rendered chat, in the order of the latter."""
    opening, *rest = _MARKED.split(marked)
    cursor = len(opening) if rendered.startswith(opening) else -1
    spans: list[tuple[str, int, int]] = []
    numbers = [int(number) for number in rest[::2]]
    for number, following in zip(numbers, rest[1::2], strict=True):
        role, said, _ = parts[number]
        forms = (said, *(strip(said, signs) for signs in (None, "\n") for strip in (str.strip, str.lstrip, str.rstrip)))
        form = next((form for form in forms if cursor >= 0 and rendered.startswith(form + following, cursor)), None)
        if form is None:
            raise _unfollowed("changes", role)
        spans.append((role, cursor, cursor + len(form)))
        cursor += len(form) + len(following)
    lost = [part.role for number, part in enumerate(parts) if number not in numbers and not part.may_go]
    if lost:
        raise _unfollowed("leaves out", lost[0])
    return spans


def _unfollowed(does: str, role: str) -> NotComputableError:
    return NotComputableError(
        f"the chat template {does} what a message of role {role} says, so its tokens cannot be told "
        "from the template's; give a template that keeps contents as they are"
    )
