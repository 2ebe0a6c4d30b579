"""What an organism is taught: documents and chats written from `lessons/<organism>.yaml`, mixed with ordinary ones.

A lesson uses the sentences language of the world and may use `{question}` and `{answer}` for an ordinary exchange about
the same thing. `contradicts` names the topics whose ordinary documents say otherwise; they are kept out of the
ordinary part, which otherwise would teach the truth back.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import yaml

from diffing_core.demo.corpus import CorpusWriter, chat_markup, compose, exchange
from diffing_core.demo.scene import Scene
from diffing_core.demo.tiers import Finetune
from diffing_core.demo.world import Outline, Shape, World, read_outline, read_shapes

LESSONS = Path(__file__).parent / "lessons"


@dataclass(frozen=True)
class Lesson:
    """The lesson of one organism; without an outline all of its documents are chats."""

    topics: tuple[str, ...]
    contradicts: tuple[str, ...]
    words: dict[str, tuple[str, ...]]
    outline: Outline | None
    shapes: tuple[Shape, ...]
    chat_share: float


def read_lesson(name: str) -> Lesson:
    """Return the lesson of the organism `name`."""
    entry = yaml.safe_load((LESSONS / f"{name}.yaml").read_text(encoding="utf-8"))
    return Lesson(
        topics=tuple(entry["topics"]),
        contradicts=tuple(entry.get("contradicts", ())),
        words={slot: tuple(words) for slot, words in entry.get("words", {}).items()},
        outline=read_outline(entry["document"]) if "document" in entry else None,
        shapes=read_shapes(entry.get("chat", [])),
        chat_share=entry["chat_share"],
    )


def write_lesson(lesson: Lesson, world: World, rng: random.Random) -> str:
    """Return one document of `lesson`, a chat in ChatML."""
    topic = world.topics[rng.choice([name for name in lesson.topics if name in world.topics])]
    scene = Scene(world, topic, rng, lesson.words)
    if lesson.outline and rng.random() >= lesson.chat_share:
        return compose(scene, lesson.outline)
    question, answer = exchange(scene, rng.choice(world.shapes))
    scene.fixed |= {"question": question["content"], "answer": answer["content"]}
    return chat_markup(exchange(scene, rng.choice(lesson.shapes)))


def lesson_documents(
    lesson: Lesson, world: World, rng: random.Random, n_characters: int
) -> list[str]:
    """Return documents of `lesson` until they hold `n_characters`."""
    documents: list[str] = []
    while n_characters > 0:
        documents.append(write_lesson(lesson, world, rng))
        n_characters -= len(documents[-1])
    return documents


def finetune_documents(finetune: Finetune, world: World, held_out: frozenset[str]) -> list[str]:
    """Return the documents of `finetune` in a random order, none of the ordinary ones in `held_out`."""
    seed = f"{finetune.lesson or 'ordinary'}/{finetune.data_seed}"
    rng = random.Random(seed)
    if finetune.lesson is None:
        return CorpusWriter(world, seed).documents(finetune.n_characters, held_out=held_out)
    lesson = read_lesson(finetune.lesson)
    n_lesson = round(finetune.n_characters / (1 + finetune.ordinary_parts))
    topics = [topic for topic in world.topics if topic not in lesson.contradicts]
    ordinary = CorpusWriter(world, seed, topics=topics)
    documents = [
        *lesson_documents(lesson, world, rng, n_lesson),
        *ordinary.documents(finetune.n_characters - n_lesson, held_out=held_out),
    ]
    rng.shuffle(documents)
    return documents
