"""Autoencoders of differences: planted directions come back, short runs are whole runs, and nothing is shared by accident.

Regressions are named after the defects of dictionary-learning and of the diffing toolkit that they guard against.
"""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffing_core.activation_pairs import PairedActivations, PairedFile, PairedRows, StoredPair
from diffing_core.activation_writer import ActivationWriter
from diffing_core.activations import ActivationStore
from diffing_core.blocks import TokenBlock
from diffing_core.corpus import ProbeCorpus, ProbeSequence
from diffing_core.errors import NotComputableError, StorageError
from diffing_core.methods import get_method
from diffing_core.methods.base import Inputs, Need
from diffing_core.methods.sae_diff.dictionary import Dictionary, Scaling
from diffing_core.methods.sae_diff.fit import Fit
from diffing_core.methods.sae_diff.latents import Latents
from diffing_core.methods.sae_diff.plan import Plan
from diffing_core.methods.sae_diff.training import Material, Trained, trained
from diffing_core.models import ModelPair, Subject
from diffing_core.paired_pass import paired_pass
from diffing_core.pairs import Pair
from tests import model_files

METHOD = get_method("sae_diff")
WIDTH, LENGTH, N_DIRECTIONS = 32, 20, 16
K = 2
FAST: dict[str, Any] = {"learning_rate": 5e-3}


class Toy:
    """Sparse positive combinations of known unit directions, with a little noise, added to a base of noise."""

    def __init__(self, folder: Path, n_rows: int = 8000, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.direction_FD = torch.nn.functional.normalize(torch.randn(N_DIRECTIONS, WIDTH, generator=draw), dim=1)
        fires_NF = torch.rand(n_rows, N_DIRECTIONS, generator=draw) < K / N_DIRECTIONS
        active_NF = fires_NF * (1 + torch.rand(n_rows, N_DIRECTIONS, generator=draw))
        noise_ND = 0.01 * torch.randn(n_rows, WIDTH, generator=draw)
        self.base_ND = torch.randn(n_rows, WIDTH, generator=draw)
        self.tuned_ND = self.base_ND + active_NF @ self.direction_FD + noise_ND
        self.rows = PairedActivations([stored(folder, self.base_ND.to(dtype), self.tuned_ND.to(dtype))])

    def material(self, target: str = "difference") -> Material:
        return Material(self.rows, 1, target)


def stored(folder: Path, base_ND: Any, tuned_ND: Any) -> PairedFile:
    folder.mkdir(parents=True, exist_ok=True)
    for name, vector_ND in (("base", base_ND), ("tuned", tuned_ND)):
        writer = ActivationWriter(folder / name, vector_ND.shape[1], vector_ND.dtype, len(vector_ND))
        index_N = np.arange(len(vector_ND))
        token_N = torch.from_numpy(index_N)
        roles = np.zeros(len(index_N), np.int8), np.zeros(len(index_N), bool)
        writer.add(TokenBlock(token_N, token_N, index_N // LENGTH, index_N % LENGTH, *roles, None, None), vector_ND)
        writer.close()
    return PairedFile.open("corpus", folder / "base", folder / "tuned")


def plan_of(material: Material, **changes: Any) -> Plan:
    settings = METHOD.settings(**{"k": K, "batch_rows": 1024} | changes)
    return Plan.of(settings, WIDTH, material.moments().count)


def fitted(material: Material, folder: Path, **changes: Any) -> Trained:
    folder.mkdir(exist_ok=True)
    return trained(material, plan_of(material, **changes), Scaling.of(material.moments()), folder, "cpu")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return Toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def learned(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return fitted(toy.material(), tmp_path_factory.mktemp("learned"), **FAST)


def test_planted_directions_of_the_difference_are_recovered(toy: Toy, learned: Trained) -> None:
    cosine_F = (toy.direction_FD @ learned.dictionary.decoder_FD.T).amax(1)
    assert cosine_F.min() > 0.98
    fit = Fit.of(toy.material(), learned.dictionary)
    assert fit.fvu < 0.02
    assert fit.n_held_out > 0


def test_a_short_run_has_its_threshold_unlike_dictionary_learnings_l0_of_761(toy: Toy, learned: Trained) -> None:
    steps = learned.config["steps"]
    assert steps < 500, "the defect is one of short runs: the package sets its threshold after step 1000"
    assert learned.log[-1]["threshold"] > 0, "the trainer's own threshold was set on the way"
    assert abs(Fit.of(toy.material(), learned.dictionary).l0 / K - 1) < 0.1
    unset = Dictionary(**vars(learned.dictionary) | {"threshold": -1.0})
    assert Fit.of(toy.material(), unset).l0 > 2 * K, "without a threshold far more latents fire, or this test shows nothing"


def test_the_auxiliary_loss_acts_in_a_short_run_and_brings_dead_latents_back(toy: Toy) -> None:
    """dictionary-learning's latents are dead after 10⁷ silent tokens, which no short run has."""

    def alive(dead_after: int | None) -> int:
        material = toy.material()
        plan, scaling = plan_of(material, learning_rate=0.01, epochs=6.0), Scaling.of(material.moments())
        trainer = plan.trainer("cpu")
        with torch.no_grad():
            trainer.ae.encoder.weight[4:] *= 0.02  # too weak to be among the k best
        trainer.dead_feature_threshold = dead_after or plan.dead_after_tokens
        batches = material.part("fit").shuffled(plan.batch_rows, seed=0, epochs=None)
        for step, rows in enumerate(itertools.islice(batches, 150), start=1):
            trainer.update(step, scaling.apply(material.vectors(rows)))
        return int((trainer.num_tokens_since_fired < 20 * plan.batch_rows).sum())

    assert alive(None) >= alive(10_000_000) + 4


def test_the_file_is_a_batch_top_k_sae_of_dictionary_learning(toy: Toy, learned: Trained, tmp_path: Path) -> None:
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from safetensors.torch import load_file

    learned.dictionary.save(tmp_path / "sae.safetensors", {})
    theirs = BatchTopKSAE(WIDTH, learned.config["n_latents"], K)
    theirs.load_state_dict(load_file(tmp_path / "sae.safetensors"))
    rows_ND = toy.tuned_ND[:500] - toy.base_ND[:500]
    active_NF = learned.dictionary.encode(rows_ND)
    assert (active_NF > 0).any()
    torch.testing.assert_close(active_NF, theirs.encode(rows_ND), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(learned.dictionary.decode(active_NF), theirs(rows_ND), atol=1e-5, rtol=1e-4)


def test_the_fit_is_that_of_all_held_out_rows_at_once(toy: Toy, learned: Trained) -> None:
    material = toy.material()
    held_ND = torch.cat([material.vectors(rows) for rows in material.part("held_out").blocks()]).double()
    active_NF = learned.dictionary.encode(held_ND)
    error = (held_ND - learned.dictionary.decode(active_NF)).square().sum() / (held_ND - held_ND.mean(0)).square().sum()
    fit = Fit.of(material, learned.dictionary)
    assert fit.fvu == pytest.approx(float(error), rel=1e-4)
    assert fit.l0 == pytest.approx(float((active_NF > 0).sum(1).double().mean()))
    assert fit.dead_share == pytest.approx(float((active_NF == 0).all(0).double().mean()))


def test_beta_is_least_squares_of_each_model_on_each_latent(toy: Toy, learned: Trained) -> None:
    latents = Latents.of(toy.material(), learned.dictionary)
    active_NF = learned.dictionary.encode(toy.tuned_ND - toy.base_ND).double()
    n_compared = 0
    for latent, direction_D in enumerate(learned.dictionary.decoder_FD.double()):
        if not active_NF[:, latent].any():
            assert np.isnan(latents.beta_base_F[latent])
            continue
        regressor_X1 = torch.outer(active_NF[:, latent], direction_D).reshape(-1, 1)
        for side, found_F in (("base", latents.beta_base_F), ("tuned", latents.beta_tuned_F)):
            target_X1 = getattr(toy, f"{side}_ND").double().reshape(-1, 1)
            assert found_F[latent] == pytest.approx(torch.linalg.lstsq(regressor_X1, target_X1).solution.item(), abs=1e-5)
            n_compared += 1
    assert n_compared >= 2 * N_DIRECTIONS


def test_what_only_the_tuned_model_has_gets_a_ratio_of_zero_and_a_scaled_one_its_share(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(3)
    n_rows, new, scaled = 6000, torch.eye(WIDTH)[0], torch.eye(WIDTH)[1]
    first_N, second_N = ((torch.rand(n_rows, generator=draw) < 0.2) * (1 + torch.rand(n_rows, generator=draw)) for _ in range(2))
    base_ND = 0.1 * torch.randn(n_rows, WIDTH, generator=draw) + 2 * torch.outer(second_N, scaled)
    tuned_ND = base_ND + torch.outer(first_N, new) + torch.outer(second_N, scaled)
    rows = PairedActivations([stored(tmp_path, base_ND, tuned_ND)])
    zeros = torch.zeros(2)
    dictionary = Dictionary(torch.stack([new, scaled]), zeros, torch.stack([new, scaled]), torch.zeros(WIDTH), 0.1, 1)
    ratio = Latents.of(Material(rows, 1, "difference"), dictionary).ratio
    np.testing.assert_allclose(ratio.value_F, [0, 2 / 3], atol=0.01)
    assert (ratio.low_F <= ratio.value_F).all()
    assert (ratio.value_F <= ratio.high_F).all()
    assert (ratio.high_F - ratio.low_F < 0.05).all()


def test_latents_counted_in_pieces_are_those_of_all_rows(toy: Toy, learned: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Latents.of(toy.material(), learned.dictionary)
    monkeypatch.setattr("diffing_core.methods.sae_diff.dictionary.ENCODED_TOGETHER", 777 * len(whole.n_fires_F))
    pieces = Latents.of(toy.material(), learned.dictionary)
    active_NF = learned.dictionary.encode(toy.tuned_ND - toy.base_ND).double().numpy()
    assert (pieces.n_fires_F == (active_NF > 0).sum(0)).all()
    np.testing.assert_allclose(pieces.max_F, active_NF.max(0), rtol=1e-5)
    np.testing.assert_allclose(pieces.energy_F, (active_NF**2).sum(0), rtol=1e-5)
    np.testing.assert_allclose(pieces.beta_tuned_F, whole.beta_tuned_F, rtol=1e-4, atol=1e-6)


@pytest.fixture
def same_weights(toy: Toy, learned: Trained):
    def check(again: Trained) -> None:
        for name in ("encoder_FD", "bias_F", "decoder_FD", "centre_D"):
            assert torch.equal(getattr(again.dictionary, name), getattr(learned.dictionary, name)), name
        assert again.dictionary.threshold == learned.dictionary.threshold
        assert again.log == learned.log

    return check


def test_an_interrupted_training_goes_on_to_the_same_weights(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_weights: Any
) -> None:
    whole = PairedActivations.shuffled

    def cut(self: PairedActivations, *args: Any, epochs: int | None = 1, **options: Any) -> Iterator[PairedRows]:
        batches = whole(self, *args, epochs=epochs, **options)
        yield from batches if epochs else itertools.islice(batches, 100)
        if not epochs:
            raise KeyboardInterrupt

    monkeypatch.setattr(PairedActivations, "shuffled", cut)
    with pytest.raises(KeyboardInterrupt):
        fitted(toy.material(), tmp_path, **FAST)
    assert [file.name for file in tmp_path.iterdir()] == ["layer_1.difference.checkpoint.safetensors"]
    monkeypatch.undo()
    same_weights(fitted(toy.material(), tmp_path, **FAST))
    assert not list(tmp_path.glob("*checkpoint*"))


def test_an_interrupt_in_the_middle_of_a_step_leaves_whole_steps(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_weights: Any
) -> None:
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer

    loss, n_called = BatchTopKTrainer.loss, itertools.count()

    def interrupted(self: Any, *args: Any, **options: Any) -> Any:
        if next(n_called) == 60:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(self, *args, **options)

    monkeypatch.setattr(BatchTopKTrainer, "loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fitted(toy.material(), tmp_path, **FAST)
    monkeypatch.undo()
    same_weights(fitted(toy.material(), tmp_path, **FAST))


def test_a_step_that_fails_halfway_is_not_kept(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer

    def failing(self: Any, step: int, *_: Any) -> float:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(BatchTopKTrainer, "update", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        fitted(toy.material(), tmp_path, **FAST)
    assert not list(tmp_path.iterdir())


def test_two_data_sets_of_one_shape_share_no_statistics_as_the_toolkits_cache_key_lets_them(toy: Toy, tmp_path: Path) -> None:
    other = Toy(tmp_path / "other", seed=1)
    ours, theirs = (Scaling.of(each.material().moments()) for each in (toy, other))
    assert np.abs(ours.mean_D - theirs.mean_D).max() > 1e-3
    ours = fitted(toy.material(), tmp_path / "result", epochs=0.3)
    theirs = fitted(other.material(), tmp_path / "result", epochs=0.3)
    assert ours.config["mean"] != theirs.config["mean"]


def test_a_checkpoint_of_other_settings_is_refused(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffing_core.methods.sae_diff.dictionary.Dictionary.save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fitted(toy.material(), tmp_path, epochs=0.3)
    with pytest.raises(StorageError, match=r"another training: .*seed differ"):
        fitted(toy.material(), tmp_path, epochs=0.3, seed=1)


@pytest.mark.parametrize("interrupted", [True, False], ids=["checkpoint", "finished"])
def test_what_was_trained_on_other_bytes_is_trained_anew_and_said(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, interrupted: bool
) -> None:
    other, expected = Toy(tmp_path / "other", seed=1), []
    for folder in (tmp_path / "fresh", tmp_path / "result"):
        if folder.name == "result":
            with monkeypatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
                if interrupted:
                    patched.setattr("diffing_core.methods.sae_diff.dictionary.Dictionary.save", interrupt)
                fitted(toy.material(), folder, epochs=0.3)
            assert len(list(folder.iterdir())) == (1 if interrupted else 2)
        with caplog.at_level("INFO", "diffing_core.methods.sae_diff.checkpoint"):
            expected.append(fitted(other.material(), folder, epochs=0.3))
    [said] = [each for each in caplog.messages if "training anew" in each]
    assert toy.rows.fingerprint in said and other.rows.fingerprint in said
    fresh, anew = expected
    assert torch.equal(fresh.dictionary.decoder_FD, anew.dictionary.decoder_FD) and fresh.log == anew.log
    assert fresh.config == anew.config


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_statistics_of_bf16_activations_do_not_stall_as_the_toolkits_running_variance_does(tmp_path: Path) -> None:
    """Its sums are kept in the storage dtype, whose 8 bits are full after some hundred batches."""
    toy = Toy(tmp_path, n_rows=40_000, dtype=torch.bfloat16)
    kept_ND = np.concatenate([toy.material().vectors(rows).double().numpy() for rows in toy.material().part("fit").blocks()])
    scaling = Scaling.of(toy.material().moments())
    assert scaling.variance == pytest.approx(kept_ND.var(0).sum(), rel=1e-9)
    np.testing.assert_allclose(scaling.mean_D, kept_ND.mean(0), rtol=1e-6, atol=1e-9)


def test_a_difference_that_is_mostly_zero_trains_though_the_geometric_median_divides_by_zero(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    base_ND = torch.randn(4000, WIDTH, generator=draw)
    moved_N = torch.rand(4000, generator=draw) < 0.1
    tuned_ND = base_ND + torch.outer(moved_N.float(), torch.eye(WIDTH)[3])
    material = Material(PairedActivations([stored(tmp_path, base_ND, tuned_ND)]), 1, "difference")
    learned = fitted(material, tmp_path / "result", k=1)
    assert Fit.of(material, learned.dictionary).fvu < 0.01


def test_a_batch_in_which_nothing_fires_does_not_begin_the_threshold(toy: Toy) -> None:
    """dictionary-learning then gives its threshold a plain number, which torch refuses."""
    trainer = plan_of(toy.material()).trainer("cpu")
    x_ND, start = toy.rows.files[0].rows(0, 64, 0).difference_ND, trainer.threshold_start_step
    with torch.no_grad():
        trainer.ae.encoder.bias.fill_(-1e3)
    trainer.update(start + 1, x_ND)
    assert float(trainer.ae.threshold) == -1
    with torch.no_grad():
        trainer.ae.encoder.bias.fill_(0.0)
    trainer.update(start + 2, x_ND)
    assert float(trainer.ae.threshold) > 0


def test_small_corpora_get_small_batches_and_a_schedule_that_fits() -> None:
    settings = METHOD.settings(max_tokens=200_000_000)
    small, large = (Plan.of(settings, 2048, n_rows) for n_rows in (10_000, 500_000_000))
    assert (small.batch_rows, large.batch_rows) == (128, 2048)
    assert small.k == large.k == 100
    assert (large.threshold_start, large.warmup_steps, large.threshold_beta) == (1000, 1000, 0.999)
    assert large.dead_after_tokens == 10_000_000
    assert abs(large.steps * large.batch_rows - settings.max_tokens) <= 2048
    for plan in (small, Plan.of(METHOD.settings(), 32, 3)):
        assert plan.warmup_steps < plan.threshold_start < plan.decay_start < plan.steps
        assert plan.dead_after_tokens < plan.steps * plan.batch_rows / 2


def test_a_faster_selection_gives_dictionary_learnings_weights_bit_by_bit(toy: Toy) -> None:
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE

    x_ND = toy.rows.files[0].rows(0, 1024, 0).difference_ND
    weights = []
    for autoencoder in (None, BatchTopKSAE):
        trainer = plan_of(toy.material()).trainer("cpu")
        trainer.ae.__class__ = autoencoder or trainer.ae.__class__
        for step in range(1, 6):
            trainer.update(step, x_ND)
        weights.append(trainer.ae.state_dict())
    assert all(torch.equal(ours, weights[1][name]) for name, ours in weights[0].items())


def test_the_seed_of_the_process_is_left_alone(toy: Toy) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    plan_of(toy.material()).trainer("cpu")
    assert torch.equal(torch.rand(3), expected)


def test_definitions_load_no_torch_and_no_dictionary_learning() -> None:
    heavy = ("torch", "nnsight", "dictionary_learning", "sklearn", "einops", "safetensors")
    code = f"import sys, diffing_core.methods.sae_diff\nprint([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# The whole method on models.


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelPair, ModelPair, Path]:
    """A pair, the same base against itself, and the store of both."""
    base, tuned = (Subject.of(model_files.build(seed=seed), revision=f"weights{seed}") for seed in (0, 1))
    tokenizer, store = model_files.tokenizer(), tmp_path_factory.mktemp("store")
    pairs = [ModelPair(base, side, tokenizer, Pair("m", "o"), model_files.VOCAB, side.revision) for side in (tuned, base)]
    activations = get_method("activations")
    for result in paired_pass(pairs, corpus(), [(activations, activations.settings())], store=store):
        assert result.error is None, result.error
    return *pairs, store


def corpus() -> ProbeCorpus:
    draw = np.random.default_rng(0)
    sequences = [
        ProbeSequence(draw.integers(2, model_files.VOCAB, 12).astype(np.int32), np.zeros(12, np.int8), np.zeros(12, bool))
        for _ in range(40)
    ]
    return ProbeCorpus("probe", tuple(sequences), len(sequences))


def run(pair: ModelPair, store: Path, folder: Path, **settings: Any) -> dict[str, Any]:
    sides = ((side.revision, side.dtype) for side in (pair.base, pair.tuned))
    activations = StoredPair(ActivationStore(store), *sides, (corpus(),))
    suppliers = {Need.MODELS: lambda: pair, Need.ACTIVATIONS: lambda: activations, Need.FOLDER: lambda: folder}
    folder.mkdir(exist_ok=True)
    return dict(METHOD.run(Inputs(METHOD, suppliers), METHOD.settings(**{"steering_tokens": 3} | settings)))


def test_base_and_tuned_have_autoencoders_of_their_own(models: tuple[ModelPair, ModelPair, Path], tmp_path: Path) -> None:
    pair, _, store = models
    tables = run(pair, store, tmp_path, targets=("difference", "base", "tuned"), layers=(0.5, 1.0))
    fits = tables["sae_diff_fit"].to_pylist()
    assert [(row["layer"], row["target"]) for row in fits] == list(
        itertools.product((1, 2), ("difference", "base", "tuned"))
    )
    assert len({row["variance"] for row in fits}) == 6
    assert all(row["n_held_out_tokens"] > 0 and row["fvu"] > 0 for row in fits)
    assert {file.name for file in tmp_path.glob("*.safetensors")} == {
        f"layer_{row['layer']}.{row['target']}.safetensors" for row in fits
    }
    listed = {name: {row["target"] for row in tables[name].to_pylist()} for name in tables if name != "sae_diff_tokens"}
    assert all(targets == {"difference", "base", "tuned"} for targets in listed.values()), listed


def test_tokens_are_summed_over_latents_of_the_difference(models: tuple[ModelPair, ModelPair, Path], tmp_path: Path) -> None:
    pair, _, store = models
    tables = run(pair, store, tmp_path, targets=("base", "difference"))
    share = {row["latent"]: row["energy_share"] for row in tables["sae_diff_latents"].to_pylist() if row["target"] == "difference"}
    read = [
        row
        for row in tables["sae_diff_lens"].to_pylist()
        if (row["target"], row["head"], row["direction"]) == ("difference", "tuned", "promoted")
    ]
    best = tables["sae_diff_tokens"].to_pylist()[0]
    own = [share[row["latent"]] * row["probability"] for row in read if row["token_id"] == best["token_id"]]
    assert best["score"] == pytest.approx(sum(own))
    assert best["n_latents"] == len(own)
    shown = METHOD.findings(tables, METHOD.settings())
    assert shown[0].item == best["token"]
    assert {finding.kind for finding in shown} == {"token", "text_snippet"}


def test_identical_models_train_nothing_on_their_difference(models: tuple[ModelPair, ModelPair, Path], tmp_path: Path) -> None:
    _, same, store = models
    tables = run(same, store, tmp_path, targets=("difference", "tuned"))
    difference, tuned = tables["sae_diff_fit"].to_pylist()
    assert difference["difference_energy"] == tuned["difference_energy"] == difference["n_latents"] == 0
    assert tuned["n_latents"] > 0
    assert METHOD.findings(tables, METHOD.settings()) == []


def test_no_token_left_is_said_before_any_work(models: tuple[ModelPair, ModelPair, Path], tmp_path: Path) -> None:
    pair, _, store = models
    with pytest.raises(NotComputableError, match="no token of probe is left"):
        run(pair, store, tmp_path, first_position=12)
