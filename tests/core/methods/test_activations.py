"""Stored activations of tiny pairs: what lies on disk, its statistics, and what pairs share."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from diffing_core import activation_parts, activation_writer
from diffing_core import paired_pass as passes
from diffing_core.activation_parts import complete_parts
from diffing_core.activation_writer import ActivationWriter
from diffing_core.activations import ActivationSet
from diffing_core.corpus import ProbeCorpus, ProbeSequence
from diffing_core.errors import NotComputableError
from diffing_core.methods import get_method
from diffing_core.methods.activations import ActivationsSettings
from diffing_core.models import ModelPair, Subject
from diffing_core.paired_pass import MethodResult, paired_pass
from diffing_core.pairs import Pair
from tests import model_files
from tests.model_files import VOCAB, WIDTH

LENGTHS = (7, 12, 4)
ACTIVATIONS = get_method("activations")


def corpus(skip: int = 0) -> ProbeCorpus:
    draw = np.random.default_rng(0)
    sequences = [
        ProbeSequence(draw.integers(2, VOCAB, n).astype(np.int32), np.zeros(n, np.int8), np.zeros(n, bool))
        for n in LENGTHS
    ]
    return ProbeCorpus("probe", tuple(sequences), len(sequences), skip_first_tokens=skip)


def subject(seed: int, dtype: torch.dtype = torch.float32) -> Subject:
    return Subject.of(model_files.build(seed=seed).to(dtype), revision=f"weights{seed}")


def pair_of(base: Subject, tuned: Subject, name: str = "o") -> ModelPair:
    return ModelPair(base, tuned, model_files.tokenizer(), Pair("m", name), VOCAB, tuned.revision)


def run(
    store: Path | None, *pairs: ModelPair, layers: tuple = (1,), skip: int = 0, budget: int = 4096
) -> list[MethodResult]:
    settings = ActivationsSettings(layers=layers)
    return list(paired_pass(pairs, corpus(skip), [(ACTIVATIONS, settings)], store=store, tokens_per_batch=budget))


def rows(result: MethodResult) -> dict[tuple[str, int], dict]:
    assert result.error is None, result.error
    return {(row["side"], row["layer"]): row for row in result.tables["activation_sets"].to_pylist()}


def states(side: Subject, layer: int) -> dict[tuple[int, int], torch.Tensor]:
    """Hidden states by (sequence, position), from a forward of each sequence alone."""
    found = {}
    for index, sequence in enumerate(corpus().sequences):
        hidden = side.module(torch.from_numpy(sequence.token_T)[None].long(), output_hidden_states=True).hidden_states
        found |= {(index, position): state_D for position, state_D in enumerate(hidden[layer + 1][0])}
    return found


def stored(folder: Path) -> tuple[list[tuple[int, int]], torch.Tensor]:
    blocks = list(ActivationSet(folder).blocks())
    keys = [key for each in blocks for key in zip(each.sequence_N.tolist(), each.position_N.tolist(), strict=True)]
    return keys, torch.cat([each.vector_ND for each in blocks])


def test_files_hold_the_models_hidden_states_and_the_table_their_moments(tmp_path: Path) -> None:
    base, tuned = subject(0), subject(1)
    [result] = run(tmp_path, pair_of(base, tuned), layers=(0, 1), budget=20)
    assert rows(result).keys() == {("base", 0), ("base", 1), ("tuned", 0), ("tuned", 1)}
    for (side, layer), row in rows(result).items():
        keys, vector_ND = stored(tmp_path / row["folder"])
        expected = states(base if side == "base" else tuned, layer)
        assert sorted(keys) == sorted(expected)
        torch.testing.assert_close(vector_ND, torch.stack([expected[key] for key in keys]), atol=1e-5, rtol=1e-4)
        exact_ND = vector_ND.double().numpy()
        np.testing.assert_allclose(row["mean"], exact_ND.mean(0), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(row["variance"], exact_ND.var(0), rtol=1e-9, atol=1e-12)
        assert row["mean_norm"] == pytest.approx(np.linalg.norm(exact_ND.mean(0)))
        assert (row["n_tokens"], row["d_model"], row["dtype"]) == (sum(LENGTHS), WIDTH, "float32")
        assert row["n_bytes"] == sum(part.stat().st_size for part in complete_parts(tmp_path / row["folder"]))


def test_bf16_models_are_stored_exactly_and_their_moments_are_float64(tmp_path: Path) -> None:
    base, tuned = subject(0, torch.bfloat16), subject(1, torch.bfloat16)
    [result] = run(tmp_path, pair_of(base, tuned))
    row = rows(result)["tuned", 1]
    _, vector_ND = stored(tmp_path / row["folder"])
    assert (row["dtype"], vector_ND.dtype) == ("bfloat16", torch.bfloat16)
    np.testing.assert_allclose(row["mean"], vector_ND.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(row["variance"], vector_ND.double().var(0, correction=0), rtol=1e-12)


def test_base_and_tuned_rows_pair_up_also_from_runs_with_other_batches(tmp_path: Path) -> None:
    base = subject(0)
    [first] = run(tmp_path, pair_of(base, subject(1)), budget=12)
    [second] = run(tmp_path, pair_of(base, subject(2)), budget=4096)
    keys = [
        stored(tmp_path / rows(result)[side, 1]["folder"])[0] for result in (first, second) for side in ("base", "tuned")
    ]
    assert keys[0] == keys[1] == keys[2] == keys[3]


def test_the_base_is_written_once_for_all_its_pairs(tmp_path: Path) -> None:
    base = subject(0)
    both = run(tmp_path, pair_of(base, subject(1), "one"), pair_of(base, subject(2), "two"))
    files = [rows(result)["base", 1]["folder"] for result in both]
    assert files[0] == files[1]
    assert len(list(tmp_path.rglob("*.parquet"))) == 3
    inode = complete_parts(tmp_path / files[0])[0].stat().st_ino
    [later] = run(tmp_path, pair_of(base, subject(3), "three"))
    assert rows(later)["base", 1] == rows(both[0])["base", 1]
    assert complete_parts(tmp_path / files[0])[0].stat().st_ino == inode
    assert len(list(tmp_path.rglob("*.parquet"))) == 4


def test_another_number_format_or_skip_of_the_same_weights_is_never_taken_for_stored(tmp_path: Path) -> None:
    """Else a base file of another run would lie beside a tuned file with other rows."""
    runs = [
        run(tmp_path, pair_of(subject(0), subject(1)))[0],
        run(tmp_path, pair_of(subject(0, torch.bfloat16), subject(1, torch.bfloat16)))[0],
        run(tmp_path, pair_of(subject(0), subject(1)), skip=2)[0],
    ]
    assert len({rows(result)["base", 1]["folder"] for result in runs}) == 3
    for result in runs:
        base, tuned = (rows(result)[side, 1] for side in ("base", "tuned"))
        assert stored(tmp_path / base["folder"])[0] == stored(tmp_path / tuned["folder"])[0]
        assert len(stored(tmp_path / base["folder"])[0]) == base["n_tokens"]
    assert rows(runs[2])["base", 1]["n_tokens"] == sum(LENGTHS) - 2 * len(LENGTHS)


def test_two_finetunes_that_are_named_alike_never_share_a_file(tmp_path: Path) -> None:
    """The toolkit's folder was the last part of a model's name: adapters of one repository read each other's."""
    base = subject(0)
    one, two = (run(tmp_path, pair_of(base, subject(seed), "adapter"))[0] for seed in (1, 2))
    assert rows(one)["tuned", 1]["folder"] != rows(two)["tuned", 1]["folder"]
    assert rows(one)["tuned", 1]["mean"] != rows(two)["tuned", 1]["mean"]


def test_statistics_of_a_run_over_stored_activations_are_not_counted_twice(tmp_path: Path) -> None:
    """The toolkit loaded the old statistics and added the same tokens to them again."""
    pair = pair_of(subject(0), subject(1))
    first, again = (rows(run(tmp_path, pair)[0]) for _ in range(2))
    assert first == again


def test_a_pair_that_fails_half_way_leaves_the_base_to_its_neighbour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of two pairs wrote the base's file too; the second one goes on with it, row for row."""
    base, tuned, other = subject(0), subject(1), subject(2)
    pairs = pair_of(base, tuned, "one"), pair_of(base, other, "two")
    add = ActivationWriter.add

    def disk_full(self: ActivationWriter, block, vector_ND, first=0) -> None:
        if "weights1" in str(self.folder):
            raise OSError("disk full")
        add(self, block, vector_ND, first)

    with monkeypatch.context() as patch:
        patch.setattr(ActivationWriter, "add", disk_full)
        failed, neighbour = run(tmp_path, *pairs, budget=12)
    assert str(failed.error) == "disk full"
    assert neighbour.error is None
    assert {file.parents[2].name for file in tmp_path.rglob("*") if file.is_file()} == {"weights0", "weights2"}
    again = run(tmp_path, *pairs)
    assert [result.error for result in again] == [None, None]
    assert len([file for file in tmp_path.rglob("*") if file.is_file()]) == 3
    [whole] = run(tmp_path / "afresh", pairs[1], budget=12)
    keys, vector_ND = stored(tmp_path / rows(neighbour)["base", 1]["folder"])
    own_keys, own_ND = stored(tmp_path / "afresh" / rows(whole)["base", 1]["folder"])
    assert keys == own_keys
    assert torch.equal(vector_ND, own_ND)


def test_a_pass_without_a_store_or_without_revisions_is_refused(tmp_path: Path) -> None:
    [homeless] = run(None, pair_of(subject(0), subject(1)))
    assert isinstance(homeless.error, NotComputableError)
    assert "give paired_pass a `store` folder" in str(homeless.error)
    [nameless] = run(tmp_path, pair_of(subject(0), Subject.of(model_files.build(seed=1))))
    assert isinstance(nameless.error, NotComputableError)
    assert "load the pair from the registry" in str(nameless.error)
    assert list(tmp_path.rglob("*.parquet")) == []


def test_table_is_readable_as_a_frame(tmp_path: Path) -> None:
    [result] = run(tmp_path, pair_of(subject(0), subject(1)))
    frame = pl.from_arrow(result.tables["activation_sets"])
    assert frame["mean"].list.len().to_list() == [WIDTH, WIDTH]
    assert ACTIVATIONS.headline(result.tables)["n_tokens"] == sum(LENGTHS)


def interrupted(store: Path, pairs: list[ModelPair], monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """A pass that is ended from outside in a forward: as by a person, no method's failure."""
    run_before, calls = passes.capture_residuals, []

    def stopped(*args):
        calls.append(args)
        if len(calls) > after:
            raise KeyboardInterrupt
        return run_before(*args)

    with monkeypatch.context() as patch:
        patch.setattr(passes, "capture_residuals", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(store, *pairs, budget=12)


def counted_forwards(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The sequences of each forward from now on."""
    run_before, seen = passes.capture_residuals, []

    def counting(subject, batch, *others):
        seen.append(batch.sequences)
        return run_before(subject, batch, *others)

    monkeypatch.setattr(passes, "capture_residuals", counting)
    return seen


def contents(store: Path) -> dict[str, bytes]:
    return {str(file.relative_to(store)): file.read_bytes() for file in store.rglob("*") if file.is_file()}


def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences of 12, 7 and 4 tokens, one a batch: rows 0-11, 12-18 and 19-22; parts of 6."""
    monkeypatch.setattr(activation_parts, "ROWS_PER_GROUP", 1)
    monkeypatch.setattr(activation_parts, "ROWS_PER_PART", 6)


def test_an_interrupted_pass_goes_on_after_what_both_sides_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_parts(monkeypatch)
    pair = pair_of(subject(0), subject(1))
    [whole] = run(tmp_path / "whole", pair, layers=(0, 1), budget=12)
    interrupted(tmp_path / "cut", [pair], monkeypatch, after=2)
    finished = contents(tmp_path / "cut")
    assert {name[-22:] for name in finished} == {"00000-of-00004.parquet", "00001-of-00004.parquet"}
    seen = counted_forwards(monkeypatch)
    [again] = run(tmp_path / "cut", pair, layers=(1,), budget=12)
    assert seen == [(0,), (0,), (2,), (2,)], "the longest sequence is stored for both models"
    assert finished.items() <= contents(tmp_path / "cut").items()
    of_layer = {name: raw for name, raw in contents(tmp_path / "whole").items() if "layer_1" in name}
    assert contents(tmp_path / "cut") == of_layer
    assert [row for key, row in rows(whole).items() if key[1] == 1] == list(rows(again).values())


def test_a_pass_with_another_method_runs_whole_and_writes_only_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_parts(monkeypatch)
    pair = pair_of(subject(0), subject(1))
    run(tmp_path / "whole", pair, budget=12)
    interrupted(tmp_path / "cut", [pair], monkeypatch, after=4)
    kept = {file: file.stat().st_ino for file in (tmp_path / "cut").rglob("*.parquet")}
    seen = counted_forwards(monkeypatch)
    kl = get_method("kl")
    both = [(ACTIVATIONS, ActivationsSettings(layers=(1,))), (kl, kl.settings())]
    results = list(paired_pass([pair], corpus(), both, store=tmp_path / "cut", tokens_per_batch=12))
    assert [result.error for result in results] == [None, None]
    assert seen == [(1,), (1,), (0,), (0,), (2,), (2,)]
    assert kept and kept == {file: file.stat().st_ino for file in kept}
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_cohort_goes_on_from_what_one_of_its_pairs_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_parts(monkeypatch)
    base, tuned, other = subject(0), subject(1), subject(2)
    one, two = pair_of(base, tuned, "one"), pair_of(base, other, "two")
    run(tmp_path / "whole", one, two, budget=12)
    interrupted(tmp_path / "cut", [one], monkeypatch, after=4)
    both = run(tmp_path / "cut", one, two, budget=12)
    assert [result.error for result in both] == [None, None]
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_first_batch_of_which_nothing_is_shown_disturbs_no_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only folds that resume are told of rows passed over."""
    whole = corpus()
    longest = replace(whole.sequences[1], start=12)
    probe = replace(whole, sequences=(whole.sequences[0], longest, whole.sequences[2]))
    seen = counted_forwards(monkeypatch)
    kl = get_method("kl")
    both = [(ACTIVATIONS, ActivationsSettings(layers=(1,))), (kl, kl.settings())]
    results = list(paired_pass([pair_of(subject(0), subject(1))], probe, both, store=tmp_path, tokens_per_batch=12))
    assert [result.error for result in results] == [None, None]
    assert seen == [(0,), (0,), (2,), (2,)]
    assert rows(results[0])["base", 1]["n_tokens"] == 7 + 4


def test_what_is_wholly_stored_takes_no_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = pair_of(subject(0), subject(1))
    first = rows(run(tmp_path, pair)[0])
    seen = counted_forwards(monkeypatch)
    assert rows(run(tmp_path, pair)[0]) == first
    assert seen == []


KILLED = """
import os, signal, sys
from pathlib import Path
import pytest
from diffing_core import paired_pass as passes
from tests.core.methods import test_activations as here

calls, run_before = [], passes.capture_residuals

def killed(*args):
    calls.append(args)
    if len(calls) > 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return run_before(*args)

passes.capture_residuals = killed
here.small_parts(pytest.MonkeyPatch())
here.run(Path(sys.argv[1]), here.pair_of(here.subject(0), here.subject(1)), budget=12)
"""


def test_a_killed_process_leaves_its_full_parts_to_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[3]
    dead = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "cut")], cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
    assert dead.returncode == -signal.SIGKILL
    left = {file.name for file in (tmp_path / "cut").rglob("*") if file.is_file()}
    assert {name for name in left if name[0] != "."} == {f"0000{number}-of-00004.parquet" for number in range(3)}
    assert any(name[0] == "." for name in left), "the part it was at"
    small_parts(monkeypatch)
    monkeypatch.setattr(activation_writer, "LEFT_OVER_AFTER_S", 0.0)
    pair = pair_of(subject(0), subject(1))
    seen = counted_forwards(monkeypatch)
    [again] = run(tmp_path / "cut", pair, budget=12)
    assert seen == [(0,), (0,), (2,), (2,)]
    [whole] = run(tmp_path / "whole", pair, budget=12)
    assert rows(again) == rows(whole)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
