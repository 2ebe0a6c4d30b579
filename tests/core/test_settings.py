"""Settings: one identity per value, the same in every process."""

import hashlib
import json
from pathlib import Path

import pytest
from pydantic import Field, ValidationError

from diffing_core.settings import Settings, diffing_home, short_hash


class Knobs(Settings):
    """Some of every kind."""

    count: int = Field(3, ge=1)
    share: float = 0.5
    layers: tuple[int | float, ...] | None = None
    name: str = "é"


def test_id_is_a_plain_hash_of_canonical_json_so_no_process_or_library_changes_it() -> None:
    text = json.dumps({"count": 3, "layers": None, "name": "é", "share": 0.5}, separators=(",", ":"))
    assert Knobs().settings_id() == hashlib.sha256(text.encode()).hexdigest()[:8]


@pytest.mark.parametrize("changed", [{"count": 4}, {"share": 0.25}, {"layers": ()}, {"layers": (1,)}, {"name": "e"}])
def test_every_value_changes_the_id(changed: dict) -> None:
    assert Knobs(**changed).settings_id() != Knobs().settings_id()


def test_a_layer_number_and_a_fraction_of_depth_are_different_settings() -> None:
    assert Knobs(layers=(1,)).settings_id() != Knobs(layers=(1.0,)).settings_id()
    assert [type(layer) for layer in Knobs(layers=(1, 1.0)).layers] == [int, float]


def test_defaults_written_out_have_the_id_of_defaults_left_out() -> None:
    assert Knobs(name="é", share=0.5, count=3).settings_id() == Knobs().settings_id()


def test_unknown_keys_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"cuont\n  Extra inputs are not permitted"):
        Knobs(cuont=4)


def test_bounds_hold_and_values_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        Knobs(count=0)
    with pytest.raises(ValidationError, match="frozen"):
        Knobs().count = 4


def test_short_hash_ignores_the_order_of_keys_and_nothing_else() -> None:
    assert short_hash({"a": 1, "b": [2, 3]}) == short_hash({"b": [2, 3], "a": 1})
    distinct = [
        {"a": 1},
        {"a": "1"},
        {"a": 1.5},
        {"a": [1]},
        {"a": None},
        {"a": True},
        {"b": 1},
        [{"a": 1}],
        [1, 2],
        [2, 1],
    ]
    assert len({short_hash(value) for value in distinct}) == len(distinct)
    assert [len(short_hash(1, digits)) for digits in (8, 12, 20)] == [8, 12, 20]


def test_home_is_the_environment_or_var_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DIFFING_HOME", raising=False)
    assert diffing_home() == tmp_path / "var"
    monkeypatch.setenv("DIFFING_HOME", "elsewhere")
    assert diffing_home() == tmp_path / "elsewhere"
