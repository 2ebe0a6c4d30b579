"""Pair keys: a codec without collisions, and names that are safe wherever a key goes."""

import random
import re
import string

import pytest

from diffing_core.errors import RegistryError
from diffing_core.pairs import Pair, check_name

REFUSED = [
    "",
    "a__b",
    "_a",
    "a_",
    "__",
    ".a",
    "-a",
    "..",
    "a..b",
    "a/b",
    "../up",
    " a",
    "a b",
    "a\n",
    "é",
    "a*",
    "[a]",
    "'",
]


def usable_names(count: int, seed: int = 0) -> list[str]:
    """Random names that pass the check, from an alphabet full of separators."""
    draw = random.Random(seed)
    names: set[str] = set()
    while len(names) < count:
        name = "".join(draw.choices(string.ascii_letters + string.digits + "___...--", k=draw.randint(1, 6)))
        try:
            names.add(check_name(name))
        except RegistryError:
            continue
    return sorted(names)


def test_key_reads_organism_model_variant() -> None:
    pair = Pair(model="Qwen2.5-7B", organism="cake_bake", variant="mix1-0.5")
    assert pair.key == str(pair) == "cake_bake__Qwen2.5-7B__mix1-0.5"
    assert Pair.parse(pair.key) == pair


def test_random_keys_round_trip_and_never_collide() -> None:
    names = usable_names(300)
    draw = random.Random(1)
    pairs = {Pair(*draw.choices(names, k=3)) for _ in range(2000)}
    assert {Pair.parse(pair.key) for pair in pairs} == pairs
    assert len({pair.key for pair in pairs}) == len(pairs)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("field", ["organism", "model", "variant"])
def test_unsafe_names_are_refused_with_a_usable_example(field: str, name: str) -> None:
    parts = {"organism": "o", "model": "m", "variant": "v"} | {field: name}
    with pytest.raises(RegistryError, match=rf"^{field} .* is not usable") as refused:
        Pair(**parts)
    [example] = re.findall(r"For example: '(.*)'$", str(refused.value))
    assert check_name(example) == example


@pytest.mark.parametrize("key", ["", "cake", "cake__demo", "cake__demo__default__more", "a__b__c__d__e"])
def test_keys_of_other_length_are_refused(key: str) -> None:
    with pytest.raises(RegistryError, match=r"expected organism__model__variant"):
        Pair.parse(key)


@pytest.mark.parametrize("key", ["a____c", "a___b__c", "__b__c", "a__b__", "a__b__c_", "a__b/x__c"])
def test_keys_with_unsafe_parts_are_refused(key: str) -> None:
    with pytest.raises(RegistryError, match="is not usable"):
        Pair.parse(key)


def test_pairs_sort_by_model_so_that_neighbours_share_a_base() -> None:
    keys = ["b__m1__v", "a__m2__v", "a__m1__w", "a__m1__v"]
    assert [pair.key for pair in sorted(map(Pair.parse, keys))] == ["a__m1__v", "a__m1__w", "b__m1__v", "a__m2__v"]
