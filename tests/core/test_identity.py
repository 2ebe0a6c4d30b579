"""Run keys: two results share an identity only if nothing that could change their numbers differs."""

from dataclasses import fields, replace

import pytest

from diffing_core.identity import RunKey
from diffing_core.pairs import Pair
from diffing_core.registry.sources import HubRef
from diffing_core.settings import Settings

KEY = RunKey(Pair("m", "o", "v"), "kl", "1", "ab12cd34", "base-hash", "tuned-hash", "probe", "corpus-hash")
COMMIT = "c" * 40


class Knobs(Settings):
    """One knob."""

    count: int = 3


@pytest.mark.parametrize("name", [field.name for field in fields(RunKey) if field.name != "pair"])
def test_every_field_changes_the_run_id(name: str) -> None:
    assert replace(KEY, **{name: "other"}).run_id != KEY.run_id


@pytest.mark.parametrize("name", [field.name for field in fields(Pair)])
def test_every_part_of_the_pair_changes_the_run_id(name: str) -> None:
    assert replace(KEY, pair=replace(KEY.pair, **{name: "other"})).run_id != KEY.run_id


def test_fields_cannot_trade_places() -> None:
    swapped = [
        replace(KEY, pair=Pair("o", "m", "v")),
        replace(KEY, model_revision=KEY.adapter_hash, adapter_hash=KEY.model_revision),
        replace(KEY, corpus=KEY.corpus_hash, corpus_hash=KEY.corpus),
        replace(KEY, method="kl1", version=""),
    ]
    assert len({key.run_id for key in [KEY, *swapped]}) == 1 + len(swapped)


def test_equal_keys_have_equal_ids() -> None:
    assert replace(KEY).run_id == KEY.run_id
    assert len(KEY.run_id) == 12


def test_two_adapters_in_one_repository_get_different_run_ids() -> None:
    """The toolkit keyed its caches by the last part of the repository's name."""
    places = [HubRef("owner/adapters"), HubRef("owner/adapters", None, "cake"), HubRef("owner/adapters", None, "owl")]
    assert len({replace(KEY, adapter_hash=place.pinned(COMMIT)).run_id for place in places}) == 3


def test_a_variant_never_shares_a_result_with_another() -> None:
    """In the toolkit seven of nine methods left the variant out of their paths."""
    one, two = (replace(KEY, pair=Pair("m", "o", variant)) for variant in ("default", "mix1-0.5"))
    assert one.run_id != two.run_id
    assert one.columns()["variant"] != two.columns()["variant"]


def test_edited_settings_change_the_run_id() -> None:
    ids = {replace(KEY, settings_id=Knobs(count=count).settings_id()).run_id for count in (3, 4)}
    assert len(ids) == 2


def test_key_columns_say_who_and_on_what() -> None:
    probed = replace(KEY, corpus="", corpus_hash="").with_corpus("probe", "corpus-hash")
    assert probed == KEY
    assert probed.columns() == {
        "organism": "o", "model": "m", "variant": "v", "corpus": "probe", "method": "kl",
        "settings_id": "ab12cd34", "run_id": KEY.run_id,
    }  # fmt: skip
