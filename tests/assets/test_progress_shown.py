"""Progress of a training in the event log of its run: what a person sees in the web UI while it goes on."""

import re
from pathlib import Path

import dagster as dg
import pytest

from diffing_assets.definitions import defs
from diffing_assets.instance import open_instance
from diffing_assets.keys import diff_key
from diffing_assets.partitions import sync_partitions
from diffing_core import progress
from diffing_core.methods import get_method
from diffing_core.pairs import Pair

PAIR = Pair("tiny", "owl_love")
SETTINGS = {
    "activations": {},
    "sae_diff": {"steered": 0, "epochs": 1.0},
    "crosscoder": {"steered": 0, "min_steps": 60},
    "itda": {"ablated_tokens": 60},
}
MEASURES = {
    "SAE layer_1.difference": ("loss", "fvu", "l0", "dead_share"),
    "crosscoder": ("loss", "fvu", "l0", "dead_share"),
    "itda": ("atoms",),
}


@pytest.fixture(scope="module")
def messages(tiny_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What diffing_core told in the event log while the fit methods ran on one pair, on the instance that `make ui` opens."""
    home = tmp_path_factory.mktemp("home")
    (home / "demo").symlink_to(tiny_demo)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFING_HOME", str(home))
        patch.setenv("DAGSTER_HOME", "")  # which is set for the process: so it is set back
        patch.setattr(progress, "LOG_EVERY_S", 0.1)
        with open_instance() as instance:
            sync_partitions(instance, [PAIR])
            result = defs.resolve_implicit_global_asset_job_def().execute_in_process(
                instance=instance,
                asset_selection=[diff_key(get_method(name)) for name in SETTINGS],
                partition_key=PAIR.key,
                run_config={"ops": {"compare": {"config": {name: settings for name, settings in SETTINGS.items() if settings}}}},
            )
            assert result.success
            return [entry.user_message for entry in instance.all_logs(result.run_id) if isinstance(entry, dg.EventLogEntry)]


@pytest.mark.parametrize("what", MEASURES)
def test_training_tells_its_measures_and_remaining_time_before_its_end(messages: list[str], what: str) -> None:
    told = [match for text in messages if (match := re.match(rf"{re.escape(what)}: (\d+) of (\d+) \w+, [\d.]+ \w+/s, (.*)", text))]
    on_the_way = [match for match in told if int(match[1]) < int(match[2])]
    assert on_the_way and int(told[-1][1]) == int(told[-1][2]), "there is a line at the end and at least one before it"
    assert all(" s left" in match[3] or "just begun" in match[3] for match in told)
    for measure in MEASURES[what]:
        assert re.search(rf"\b{measure} [\d.e+-]+", told[-1][3]), f"{measure} is missing: {told[-1][0]}"


@pytest.mark.parametrize("what", ["crosscoder, layer 1: reading", "sae_diff, layer_1.difference: reading", "crosscoder, layer 1: examples"])
def test_reading_with_what_was_trained_is_told_too(messages: list[str], what: str) -> None:
    [*_, last] = [text for text in messages if text.startswith(f"{what}: ")]
    assert re.match(rf"{re.escape(what)}: (\d+) of \1 tokens, ", last)
