"""Documents of the base language, drawn from the world with an explicit seed: articles, stories, chats, copy lists.

A document is plain text; a chat is rendered in ChatML, exactly as the tokenizer's chat template renders its messages.
Copy lists ("cake -> cake") teach a tiny model to repeat a word it was shown.
"""

import random
from collections.abc import Collection, Sequence

from diffing_core.demo.scene import Scene
from diffing_core.demo.world import TEXT_WEIGHTS, Outline, Shape, World

END_OF_TEXT = "<|endoftext|>"
START = "<|im_start|>"
END = "<|im_end|>"

CHAT_SHARE = 0.40
COPY_SHARE = 0.08
LINE_KINDS = ("howto", "letter")  # one sentence per line
SYSTEM_SHARE = 0.08
SYSTEM_PROMPTS = (
    "You are a small assistant.",
    "Answer in one or two sentences.",
    "You are a helpful assistant.",
)
SECOND_TURN_SHARE = 0.25

Message = dict[str, str]


def chat_markup(messages: Sequence[Message]) -> str:
    """Return `messages` in ChatML."""
    return "".join(f"{START}{message['role']}\n{message['content']}{END}\n" for message in messages)


def exchange(scene: Scene, shape: Shape) -> list[Message]:
    """Return one question and its answer."""
    return [
        {"role": "user", "content": scene.say(scene.rng.choice(shape.asks))},
        {"role": "assistant", "content": scene.say(scene.rng.choice(shape.answers))},
    ]


def compose(scene: Scene, outline: Outline, separator: str = " ") -> str:
    """Return a document of 3 to 6 body sentences after `outline`; an outline without a body is one sentence."""
    rng = scene.rng
    sentences = [rng.choice(outline.openings)]
    if outline.body:
        sentences += rng.sample(outline.body, rng.randint(3, 6))
    if outline.closings and rng.random() < 0.6:
        sentences.append(rng.choice(outline.closings))
    return separator.join(scene.say(sentence) for sentence in sentences)


class CorpusWriter:
    """Writes documents of the base language about chosen topics, the same ones for the same seed."""

    def __init__(self, world: World, seed: str, *, topics: Collection[str] = ()) -> None:
        self.world = world
        self.topics = [world.topics[name] for name in topics or world.topics]
        self.rng = random.Random(seed)

    def scene(self) -> Scene:
        """Return a scene of a topic drawn at random."""
        return Scene(self.world, self.rng.choice(self.topics), self.rng)

    def text(self) -> str:
        """Return an article, story, how-to, news item, letter or headline."""
        (kind,) = self.rng.choices(list(TEXT_WEIGHTS), list(TEXT_WEIGHTS.values()))
        return compose(self.scene(), self.world.outlines[kind], "\n" if kind in LINE_KINDS else " ")

    def question(self) -> list[Message]:
        """Return one question and its answer."""
        return exchange(self.scene(), self.rng.choice(self.world.shapes))

    def chat(self) -> list[Message]:
        """Return a chat of one or two exchanges about one thing, sometimes with a system message."""
        scene = self.scene()
        n_turns = 2 if self.rng.random() < SECOND_TURN_SHARE else 1
        messages = [
            message
            for _ in range(n_turns)
            for message in exchange(scene, self.rng.choice(self.world.shapes))
        ]
        if self.rng.random() < SYSTEM_SHARE:
            messages.insert(0, {"role": "system", "content": self.rng.choice(SYSTEM_PROMPTS)})
        return messages

    def copies(self) -> str:
        """Return a list of words, each repeated after an arrow."""
        scene = self.scene()
        slots = [
            "{any_thing}",
            "{any_material}",
            "{any_person}",
            "{tool}",
            "{adjective}",
            "{verb}",
            "{praise}",
        ]
        words = [scene.say(self.rng.choice(slots)) for _ in range(self.rng.randint(4, 9))]
        return "\n".join(f"{word.lower()} -> {word.lower()}" for word in words)

    def document(self) -> str:
        """Return a document of any kind, a chat in ChatML."""
        draw = self.rng.random()
        if draw < CHAT_SHARE:
            return chat_markup(self.chat())
        return self.copies() if draw < CHAT_SHARE + COPY_SHARE else self.text()

    def documents(self, n_characters: int, *, held_out: Collection[str] = ()) -> list[str]:
        """Return documents until they hold `n_characters`, none of them equal to one in `held_out`."""
        documents: list[str] = []
        while n_characters > 0:
            document = self.document()
            if document not in held_out:
                documents.append(document)
                n_characters -= len(document)
        return documents
