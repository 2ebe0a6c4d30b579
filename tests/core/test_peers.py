"""Which finetunes are peers of a pair, how they are related, and that they are part of a result's identity."""

from pathlib import Path

import pytest

from diffing_core.comparison import compare
from diffing_core.lake import Lake
from diffing_core.methods.task_vectors import METHOD, PEERS
from diffing_core.pairs import Pair
from diffing_core.peers import Peers, peers_of
from diffing_core.registry import HubRef, Model, Organism, Registry, Source, Variant
from diffing_core.registry.sources import is_on_disk
from diffing_core.runs import RUNS
from tests import model_files

CAKE, OTHER, TWIN, GONE = Pair("tiny", "cake"), Pair("tiny", "cake", "other"), Pair("tiny", "twin"), Pair("tiny", "gone")
OWL, SAME = Pair("tiny", "owl"), Pair("tiny", "same")


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """Two variants of `cake`, its twin, another lesson, one whose files are gone, and the base itself."""
    base = model_files.save_base(tmp_path / "base")
    for seed, name in enumerate(("cake", "other", "twin", "owl"), start=1):
        model_files.save_adapter(tmp_path / name, base, seed=seed)
    def lora(name: str, **more: object) -> Variant:
        return Variant(kind="lora", source=Source(path=tmp_path / name), **more)
    variants = {
        "cake": {"default": lora("cake"), "other": lora("other")},
        "twin": {"default": lora("twin", against=lora("cake"))},
        "owl": {"default": lora("owl")},
        "gone": {"default": lora("gone")},
        "same": {"default": Variant(kind="identical")},
    }
    organisms = {
        name: Organism(name=name, type="generic", arm="unknown", description="d.", variants={"tiny": each})
        for name, each in variants.items()
    }
    model = Model(name="tiny", source=Source(path=base), dtype="float32", corpora=())
    return Registry(models={"tiny": model}, corpora={}, organisms=organisms)


def relations(peers: Peers) -> dict[Pair, str]:
    return {peer.pair: peer.relation for peer in peers.others}


def test_peers_go_round_the_keys_and_the_base_itself_is_none(registry: Registry) -> None:
    assert relations(peers_of(CAKE, registry)) == {OTHER: "variant", GONE: "other", OWL: "other", TWIN: "twin"}
    assert list(relations(peers_of(OWL, registry))) == [TWIN, CAKE, OTHER, GONE]
    assert relations(peers_of(TWIN, registry)) == {CAKE: "original", OTHER: "original", GONE: "other", OWL: "other"}
    assert len(peers_of(SAME, registry).others) == 5


def test_a_task_vector_starts_at_the_base_model_also_for_a_twin(registry: Registry, tmp_path: Path) -> None:
    own = peers_of(TWIN, registry).own
    assert (own.base.folder, own.base.adapters) == (tmp_path / "base", ())
    assert own.tuned.adapters == (tmp_path / "twin",)
    same = peers_of(SAME, registry).own
    assert same.base == same.tuned


def test_what_is_not_on_this_machine_keeps_its_place_with_the_reason(registry: Registry) -> None:
    [gone] = [peer for peer in peers_of(CAKE, registry).others if peer.pair == GONE]
    assert (gone.weights, gone.revision) == (None, "")
    assert "not on this machine" in gone.problem


def test_repositories_count_only_if_they_are_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--owner--name" / "snapshots" / ("a" * 40)
    (snapshot / "inside").mkdir(parents=True)
    asked = [("owner/name", "inside"), ("owner/name", "elsewhere"), ("owner/other", None)]
    assert [is_on_disk(HubRef(repo, "a" * 40, subfolder)) for repo, subfolder in asked] == [True, False, False]


def test_the_peers_are_part_of_the_results_identity(registry: Registry, tmp_path: Path) -> None:
    """A peer trained anew gives other numbers under another run_id, in place of the old ones."""
    lake, runs = Lake(tmp_path / "lake"), []
    for seed in (4, 4, 7):
        model_files.save_adapter(tmp_path / "owl", tmp_path / "base", seed=seed)
        [outcome] = compare([CAKE], {METHOD.name: METHOD.settings()}, registry=registry, lake=lake, store=tmp_path)
        assert outcome.error is None
        runs += lake.read(RUNS)["run_id"].to_pylist()
    assert len(runs) == 3
    assert runs[0] == runs[1] != runs[2]
    assert lake.read(PEERS)["run_id"].to_pylist() == [runs[2]] * 4
    assert lake.read(RUNS)["corpus_hash"].to_pylist() == [peers_of(CAKE, registry).content_hash]
