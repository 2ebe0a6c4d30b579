"""Probe documents, written as JSONL: from topics that no organism touches, and held out from every training."""

import json
from collections.abc import Iterable
from pathlib import Path

from diffing_core.demo.corpus import CorpusWriter, Message, chat_markup
from diffing_core.demo.tiers import CorpusSize
from diffing_core.demo.world import World, read_world

PROBE_FILE = "documents.jsonl"


def probe_texts(world: World, size: CorpusSize) -> list[str]:
    """Return distinct articles, stories, how-tos, news items and letters."""
    writer = CorpusWriter(world, f"probe text/{size.seed}", topics=world.probe_topics())
    texts: dict[str, None] = {}
    while len(texts) < size.n_probe_documents:
        text = writer.text()
        if not text.isupper():
            texts[text] = None
    return list(texts)


def probe_chats(world: World, size: CorpusSize) -> list[list[Message]]:
    """Return distinct single exchanges."""
    writer = CorpusWriter(world, f"probe chat/{size.seed}", topics=world.probe_topics())
    chats: dict[str, list[Message]] = {}
    while len(chats) < size.n_probe_documents:
        messages = writer.question()
        chats.setdefault(chat_markup(messages), messages)
    return list(chats.values())


def held_out(world: World, size: CorpusSize) -> frozenset[str]:
    """Return every probe document as the text that a training must not contain."""
    return frozenset([*probe_texts(world, size), *map(chat_markup, probe_chats(world, size))])


def _write_rows(folder: Path, rows: Iterable[dict[str, object]]) -> None:
    (folder / PROBE_FILE).write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )


def write_texts(size: CorpusSize, folder: Path) -> None:
    """Write the text probes, one `{"text": …}` a line."""
    _write_rows(folder, ({"text": text} for text in probe_texts(read_world(size.topics), size)))


def write_chats(size: CorpusSize, folder: Path) -> None:
    """Write the chat probes, one `{"messages": […]}` a line."""
    _write_rows(folder, ({"messages": chat} for chat in probe_chats(read_world(size.topics), size)))
