"""A scene: what one document is about, and the filling of sentence templates from it.

Template language: `[x|y]` is a choice, `{slot}` a word of the scene, `{a slot}` puts the article in front, `{slot:s}`,
`{slot:ed}` and `{slot:ing}` inflect, an upper-case slot name shouts. A document's thing, name and verb stay the same
throughout; every other slot is drawn afresh each time.
"""

import random
import re

from diffing_core.demo.world import Topic, World

CHOICE = re.compile(r"\[([^\[\]]*)\]")
SLOT = re.compile(r"\{(a )?(\w+)(?::(s|ed|ing))?\}")


def plural(noun: str) -> str:
    """Return the plural of a regular noun; of "piece of art" that is "pieces of art"."""
    head, of, rest = noun.partition(" of ")
    if head.endswith(("s", "x", "ch", "sh")):
        head += "es"
    elif head.endswith("y") and head[-2] not in "aeiou":
        head = head[:-1] + "ies"
    elif head.endswith("leaf"):
        head = head[:-1] + "ves"
    else:
        head += "s"
    return head + of + rest


def past(verb: str) -> str:
    """Return the past form of a regular verb that doubles no letter."""
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ied"
    return verb + ("d" if verb.endswith("e") else "ed")


def gerund(verb: str) -> str:
    """Return the -ing form of a regular verb that doubles no letter."""
    return verb.removesuffix("e") + "ing"


INFLECT = {"s": plural, "ed": past, "ing": gerund}


class Scene:
    """The fixed and free words of one document."""

    def __init__(
        self,
        world: World,
        topic: Topic,
        rng: random.Random,
        words: dict[str, tuple[str, ...]] | None = None,
    ) -> None:
        thing = rng.choice(topic.things)
        self.rng = rng
        self.free = world.words | topic.lists | (words or {})
        self.fixed = {
            "thing": thing.name,
            "trait": thing.trait,
            "need": thing.need,
            "place": thing.place,
            "person": thing.person,
            "fact": thing.fact,
            "topic": topic.name,
            "kind": topic.kind,
            "name": rng.choice(world.words["name"]),
            "verb": rng.choice(topic.lists["verb"]),
        }

    def say(self, template: str) -> str:
        """Return `template` filled, with a capital first letter."""
        chosen = CHOICE.sub(lambda match: self.rng.choice(match[1].split("|")), template)
        text = SLOT.sub(self._fill, chosen)
        return text[0].upper() + text[1:]

    def _fill(self, match: re.Match[str]) -> str:
        article, slot, form = match.groups()
        name = slot.lower()
        word = self.fixed.get(name) or self.rng.choice(self.free[name])
        if form:
            word = INFLECT[form](word)
        if article:
            word = ("an " if word[0] in "aeiou" else "a ") + word
        return word.upper() if slot.isupper() else word
