"""Rank truncation: what copies and rests are, how far they are from the tuned model, and what is said of them."""

import shutil
from pathlib import Path

import polars as pl
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from diffing_core.methods.base import Inputs, Need
from diffing_core.methods.rank_truncation import METHOD, Cut, RankTruncationSettings, cuts, headline, run
from diffing_core.models import ModelPair
from diffing_core.subject import Subject
from diffing_core.weight_edits import Term, folders
from diffing_core.weight_edits.folders import write_terms
from diffing_core.weights import WeightPair
from tests import model_files


@pytest.fixture(scope="module")
def low_rank(tmp_path_factory: pytest.TempPathFactory) -> WeightPair:
    """A whole checkpoint whose matrices in the blocks changed by rank 2."""
    root = tmp_path_factory.mktemp("low_rank")
    base = model_files.save_base(root / "base", tie_word_embeddings=False)
    return WeightPair.of_folders(base, save_changed(root / "tuned", base, 2))


def save_changed(folder: Path, base: Path, rank: int) -> Path:
    model = tf.AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name:
                weight += 0.1 * torch.randn(len(weight), rank) @ torch.randn(rank, weight.shape[1])
    model.save_pretrained(folder)
    return folder


def tables_of(files: WeightPair, *, weights: WeightPair | None = None, of_base: Path | None = None, **settings: object) -> dict:
    """`weights`: other files of the same change; `of_base`: another model in the base's place."""
    def load(folder: Path) -> Subject:
        return Subject.of(tf.AutoModelForCausalLM.from_pretrained(folder))

    pair = ModelPair.of(load(of_base or files.base.folder), load(files.tuned.folder), model_files.tokenizer())
    given = {"prompts": ("doc: w3", "doc: w5", "doc: w8"), "max_new_tokens": 8, "samples": 2} | settings
    suppliers = {Need.MODELS: lambda: pair, Need.WEIGHTS: lambda: weights or files}
    return run(Inputs(METHOD, suppliers), RankTruncationSettings(**given))


def test_a_copy_of_the_whole_rank_is_the_tuned_model_and_its_rest_the_base(low_rank: WeightPair) -> None:
    tables = tables_of(low_rank, ranks=(1, 2), rests=(2,))
    rows = {row["side"]: row for row in tables["rank_truncation_models"].to_pylist()}
    assert rows["tuned"]["kl_nats"] == 0
    assert rows["rank2"]["share_kept"] == pytest.approx(1, abs=1e-4)
    assert rows["rank2"]["energy_share"] == pytest.approx(1, abs=1e-4)
    assert rows["rest2"]["share_kept"] == pytest.approx(0, abs=1e-3)
    assert rows["rest2"]["energy_share"] == pytest.approx(0, abs=1e-4)
    assert 0.3 < rows["rank1"]["energy_share"] < 0.95
    assert rows["base"]["share_kept"] == 0
    samples = pl.from_arrow(tables["rank_truncation_samples"])
    texts = {model: samples.filter(pl.col("side") == model)["text"].to_list() for model in rows}
    assert texts["rank2"] == texts["tuned"]
    assert texts["rest2"] == texts["base"]


def test_stable_rank_and_energy_stand_beside_every_matrix(low_rank: WeightPair) -> None:
    modules = pl.from_arrow(tables_of(low_rank, ranks=(1, 2))["rank_truncation_modules"])
    key = "layers.1.mlp.up_proj.weight"
    states = [tf.AutoModelForCausalLM.from_pretrained(side.folder).state_dict() for side in (low_rank.base, low_rank.tuned)]
    sigma = torch.linalg.svdvals((states[1][f"model.{key}"] - states[0][f"model.{key}"]).double())
    found = modules.filter(pl.col("name") == key).sort("rank")
    assert found["stable_rank"].to_list() == pytest.approx([(sigma**2).sum().item() / sigma[0].item() ** 2] * 2, rel=1e-4)
    shares = ((sigma**2).cumsum(0) / (sigma**2).sum())[:2].tolist()
    assert found["energy_share"].to_list() == pytest.approx(shares, rel=1e-4)


def test_every_rank_is_tried_at_every_scale_and_the_tuned_model_is_not_made_again() -> None:
    settings = RankTruncationSettings(ranks=(1, "full"), scales=(1.0, 1.5, "keep"), rests=(1, 2))
    assert [cut.name for cut in cuts(settings)] == ["rank1", "rank1_x1.5", "rank1_keep", "full_x1.5", "rest1", "rest2"]
    assert Cut("copy", 4, 2.0).name == "rank4_x2"


def test_scales_change_what_is_added_and_not_the_energy_that_is_left(low_rank: WeightPair) -> None:
    rows = pl.from_arrow(tables_of(low_rank, ranks=(1,), scales=(1.0, 4.0, "keep"))["rank_truncation_models"])
    by_model = {row["side"]: row for row in rows.to_dicts()}
    assert by_model["rank1_x4"]["energy_share"] == by_model["rank1"]["energy_share"] == by_model["rank1_keep"]["energy_share"]
    assert by_model["rank1_x4"]["kl_nats"] > by_model["rank1"]["kl_nats"]
    assert by_model["rank1_keep"]["scale"] == "keep"


def test_the_headline_says_what_the_copies_keep(low_rank: WeightPair) -> None:
    said = headline(tables_of(low_rank, ranks=(1, 2)))
    assert said["share_kept_rank1"] < said["share_kept_rank2"]
    assert 1 <= said["mean_stable_rank"] <= 2


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_block_without_its_change_is_as_far_from_the_tuned_model_as_stock_weights_say(tmp_path: Path, kind: str) -> None:
    """Only block 1's MLP and block 2's attention change: taking both away is the base, and block 0 holds nothing."""
    base = model_files.save_base(tmp_path / "base", tie_word_embeddings=False)
    changed = ("layers.1.mlp.up_proj.weight", "layers.2.self_attn.q_proj.weight")

    def tuned(folder: Path, *names: str) -> Path:
        model = tf.AutoModelForCausalLM.from_pretrained(base)
        torch.manual_seed(3)
        with torch.no_grad():
            for name in changed:
                weight = model.get_parameter(f"model.{name}")
                change = torch.randn(len(weight), 1) @ torch.randn(1, weight.shape[1])
                weight += 0.3 * change * (name in names)
        model.save_pretrained(folder)
        return folder

    whole = WeightPair.of_folders(base, tuned(tmp_path / "tuned", *changed))
    files, stock = whole, WeightPair.of_folders(tuned(tmp_path / "only_attention", changed[1]), whole.tuned.folder)
    if kind == "lora":
        (tmp_path / "lora").mkdir()
        assert write_terms(tmp_path / "lora", [Term(whole, rank=1)]) == "lora"
        files = WeightPair.of_folders(base, tmp_path / "lora")

    def blocks(**settings: object) -> dict[tuple[int, str], dict]:
        rows = tables_of(whole, weights=files, ranks=(1,), rests=(), **settings)["rank_truncation_blocks"].to_pylist()
        return {(row["layer"], row["modules"]): row for row in rows}

    found = blocks(ablated=("attention", "mlp", "all"), ablate_checkpoints=kind == "full")
    assert len(found) == 9
    lost = {key: row["share_lost"] for key, row in found.items() if row["share_lost"]}
    assert lost.keys() == {(1, "mlp"), (1, "all"), (2, "attention"), (2, "all")}
    assert lost[1, "mlp"] == pytest.approx(lost[1, "all"], rel=1e-3) and lost[2, "attention"] > 0
    expected = tables_of(whole, of_base=stock.base.folder, weights=files, ranks=(1,), rests=(), ablated=())
    base_row = expected["rank_truncation_models"].to_pylist()[0]
    assert found[1, "mlp"]["kl_nats"] == pytest.approx(base_row["kl_nats"], rel=1e-2)
    assert (blocks() == {}) == (kind == "full")


def test_no_checkpoint_is_written_per_block_where_a_lora_changes_a_matrix_that_runs_as_no_module(
    low_rank: WeightPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with Mamba's A_log, or a router: the change has factors, and no module can carry them."""
    base = shutil.copytree(low_rank.base.folder, tmp_path / "base")
    lora = tmp_path / "lora"
    lora.mkdir()
    assert write_terms(lora, [Term(low_rank, rank=1)]) == "lora"
    added = {
        base / "model.safetensors": {"model.layers.1.mlp.router.weight": torch.randn(8, 6)},
        lora / "adapter_model.safetensors": {
            "base_model.model.model.layers.1.mlp.router.lora_A.weight": torch.randn(1, 6),
            "base_model.model.model.layers.1.mlp.router.lora_B.weight": torch.randn(8, 1),
        },
    }
    for file, weights in added.items():
        save_file(load_file(file) | weights, file, metadata={"format": "pt"})
    files = WeightPair.of_folders(base, lora)
    written: list[Path] = []
    keeping = folders.write_checkpoint
    monkeypatch.setattr(folders, "write_checkpoint", lambda folder, *rest: (written.append(folder), keeping(folder, *rest)))
    assert not tables_of(low_rank, weights=files, ranks=(1,), rests=())["rank_truncation_blocks"].num_rows
    assert len(written) == 1
    assert tables_of(low_rank, weights=files, ranks=(1,), rests=(), ablate_checkpoints=True)["rank_truncation_blocks"].num_rows
