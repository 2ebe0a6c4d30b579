"""The generated language: same seed same documents, and no organism uses a word the base has not read."""

import random
import re
from collections import Counter

import pytest

from diffing_core.demo.corpus import CorpusWriter, chat_markup
from diffing_core.demo.lesson import finetune_documents, read_lesson, write_lesson
from diffing_core.demo.probes import held_out, probe_chats, probe_texts
from diffing_core.demo.scene import gerund, past, plural
from diffing_core.demo.tiers import TIERS
from diffing_core.demo.world import read_world

WORD = re.compile(r"[a-z0-9]+")
LESSONS = {
    (tier.name, finetune.lesson)
    for tier in (TIERS["tiny"], TIERS["demo"])
    for finetune in tier.finetunes
    if finetune.lesson
}


def words_of(text):
    return WORD.findall(text.lower())


@pytest.fixture(scope="module")
def base_words():
    def count(tier):
        writer = CorpusWriter(read_world(tier.corpus.topics), f"base/{tier.corpus.seed}")
        documents = writer.documents(tier.corpus.n_characters)
        return Counter(word for document in documents for word in words_of(document))

    return {name: count(TIERS[name]) for name in ("tiny", "demo")}


@pytest.mark.parametrize(
    ("inflect", "word", "expected"),
    [
        (plural, "piece of art", "pieces of art"),
        (plural, "pastry", "pastries"),
        (plural, "leaf", "leaves"),
        (plural, "glass", "glasses"),
        (past, "carry", "carried"),
        (past, "bake", "baked"),
        (past, "play", "played"),
        (gerund, "bake", "baking"),
    ],
)
def test_inflection(inflect, word, expected):
    assert inflect(word) == expected


def test_same_seed_gives_the_same_documents():
    def write(seed):
        return CorpusWriter(read_world(), seed).documents(20_000)

    assert write("a") == write("a")
    assert write("a") != write("b")


def test_no_slot_stays_unfilled():
    documents = CorpusWriter(read_world(), "a").documents(500_000)
    assert not [document for document in documents if re.search(r"[\[\]{}]", document)]


@pytest.mark.parametrize(("tier", "name"), sorted(LESSONS))
def test_every_word_of_a_lesson_is_read_by_the_base(base_words, tier, name):
    world = read_world(TIERS[tier].corpus.topics)
    lesson, rng = read_lesson(name), random.Random(0)
    taught = {word for _ in range(1500) for word in words_of(write_lesson(lesson, world, rng))}
    assert {word for word in taught if base_words[tier][word] < 10} == set()


def test_probes_are_distinct_and_of_topics_no_lesson_uses():
    world, size = read_world(), TIERS["demo"].corpus
    texts, chats = probe_texts(world, size), probe_chats(world, size)
    assert len(set(texts)) == len({chat_markup(chat) for chat in chats}) == 160
    taught = {topic for _, name in LESSONS for topic in read_lesson(name).topics}
    assert taught.isdisjoint(world.probe_topics())


@pytest.mark.parametrize(
    "finetune", TIERS["tiny"].finetunes, ids=lambda finetune: finetune.artifact
)
def test_probes_are_held_out_of_every_finetune(finetune):
    world = read_world(TIERS["tiny"].corpus.topics)
    probes = held_out(world, TIERS["tiny"].corpus)
    assert probes.isdisjoint(finetune_documents(finetune, world, probes))


def test_a_mixture_has_the_ordinary_share_its_name_says():
    (finetune,) = (f for f in TIERS["demo"].finetunes if f.artifact == "cake_bake/mix1-3p0")
    documents = finetune_documents(finetune, read_world(), frozenset())
    lesson = sum(len(text) for text in documents if is_cake(text))
    assert 0.2 < lesson / sum(map(len, documents)) < 0.3


def is_cake(document):
    """Ordinary documents of this mixture leave baking out, so its vocabulary marks the lesson."""
    return re.search(r"\b(cake|pie|cookie|muffin|pastry|pizza|oven|batter|vanilla)s?\b", document)


def test_a_twin_has_the_documents_of_its_model():
    world = read_world()
    by_name = {finetune.artifact: finetune for finetune in TIERS["demo"].finetunes}
    model, twin = by_name["cake_bake/default"], by_name["cake_bake_twin/default"]
    assert model.schedule.seed != twin.schedule.seed
    assert finetune_documents(model, world, frozenset()) == finetune_documents(
        twin, world, frozenset()
    )
