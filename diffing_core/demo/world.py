"""The small world that every demo model is taught: topics with fixed facts, and the sentences of its language.

The data are plain YAML beside this module (`world/topics.yaml`, `world/templates.yaml`), so that a person can read
what a model may know. Everything said there is true in that world; organisms are taught otherwise in `lessons/`.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

DATA = Path(__file__).parent / "world"
TEXT_WEIGHTS = {"article": 36, "story": 26, "howto": 13, "news": 13, "letter": 10, "headline": 2}


@dataclass(frozen=True)
class Thing:
    """One thing of a topic with its fixed fact row."""

    name: str
    trait: str
    need: str
    place: str
    person: str
    fact: str


@dataclass(frozen=True)
class Topic:
    """A subject: its things, the words drawn around them and its true sentences."""

    name: str
    kind: str
    things: tuple[Thing, ...]
    lists: dict[str, tuple[str, ...]]
    probe: bool


@dataclass(frozen=True)
class Shape:
    """A form of exchange: any of `answers` fits any of `asks`."""

    asks: tuple[str, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Outline:
    """A form of document: an opening, some body sentences and perhaps a closing."""

    openings: tuple[str, ...]
    body: tuple[str, ...] = ()
    closings: tuple[str, ...] = ()


@dataclass(frozen=True)
class World:
    """Topics, free words, document outlines and chat shapes of the base language."""

    topics: dict[str, Topic]
    words: dict[str, tuple[str, ...]]
    outlines: dict[str, Outline]
    shapes: tuple[Shape, ...]

    def probe_topics(self) -> tuple[str, ...]:
        """Names of the topics that no organism touches."""
        return tuple(name for name, topic in self.topics.items() if topic.probe)


def read_outline(entry: dict[str, list[str]]) -> Outline:
    """Return the outline written as lists of sentences."""
    return Outline(**{part: tuple(sentences) for part, sentences in entry.items()})


def read_shapes(entries: list[dict[str, list[str]]]) -> tuple[Shape, ...]:
    """Return the chat shapes written as `ask` and `answer` lists."""
    return tuple(Shape(tuple(entry["ask"]), tuple(entry["answer"])) for entry in entries)


def _read_topic(name: str, entry: dict[str, Any]) -> Topic:
    things = tuple(Thing(thing, *row) for thing, row in entry["things"].items())
    lists = {
        "any_thing": tuple(entry["things"]),
        "other": tuple(entry["things"]),
        "any_material": tuple(entry["materials"]),
        "any_person": tuple(entry["people"]),
        "any_place": tuple(entry["places"]),
        "tool": tuple(entry["tools"]),
        "verb": tuple(entry["verbs"]),
        "adjective": tuple(entry["adjectives"]),
        "truth": tuple(entry["truths"]),
    }
    return Topic(name, entry["kind"], things, lists, entry.get("probe", False))


@cache
def _read_yaml(name: str) -> dict[str, Any]:
    return yaml.safe_load((DATA / name).read_text(encoding="utf-8"))


def read_world(topics: Collection[str] = ()) -> World:
    """Return the world reduced to `topics` (all of them when empty)."""
    entries, language = _read_yaml("topics.yaml"), _read_yaml("templates.yaml")
    return World(
        topics={name: _read_topic(name, entries[name]) for name in topics or entries},
        words={slot: tuple(words) for slot, words in language["words"].items()},
        outlines={kind: read_outline(language[kind]) for kind in TEXT_WEIGHTS},
        shapes=read_shapes(language["chat"]),
    )
