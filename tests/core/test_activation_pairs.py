"""Paired activations: every chosen row once an epoch, in random order, of the right partner."""

from pathlib import Path

import numpy as np
import pytest
import torch

from diffing_core import activation_pairs, activation_parts
from diffing_core.activation_pairs import PairedActivations, PairedFile, PairedRows, Selection
from diffing_core.activation_writer import ActivationWriter
from diffing_core.blocks import TokenBlock
from diffing_core.errors import StorageError

WIDTH, LENGTH = 3, 10
GROUP = 16


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (activation_parts, activation_pairs):
        monkeypatch.setattr(module, "ROWS_PER_GROUP", GROUP)
    monkeypatch.setattr(activation_parts, "ROWS_PER_PART", 4 * GROUP)


def stored(path: Path, n_rows: int, first: int, sign: int, *, cut: int = 7) -> Path:
    """Rows whose vectors hold their own number, times a sign; blocks of `cut` rows."""
    writer = ActivationWriter(path, WIDTH, torch.float32, n_rows)
    for start in range(0, n_rows, cut):
        index_N = np.arange(start, min(start + cut, n_rows))
        token_N = torch.from_numpy(index_N + first)
        facts = index_N // LENGTH, index_N % LENGTH, (index_N % 5).astype(np.int8), index_N % 3 == 0
        vector_ND = sign * torch.from_numpy(index_N + first).float()[:, None].expand(-1, WIDTH).contiguous()
        writer.add(TokenBlock(token_N, token_N, *facts, None, None), vector_ND)
    writer.close()
    return path


def material(folder: Path, *sizes: int) -> PairedActivations:
    files = []
    for number, size in enumerate(sizes):
        base = stored(folder / f"base{number}", size, 1000 * number, 1)
        tuned = stored(folder / f"tuned{number}", size, 1000 * number, -1, cut=11)
        files.append(PairedFile.open(f"corpus{number}", base, tuned))
    return PairedActivations(files)


def numbers(batches: list[PairedRows]) -> list[int]:
    return [int(value) for rows in batches for value in rows.base_ND[:, 0]]


def test_vectors_of_both_models_and_all_facts_stay_together(tmp_path: Path) -> None:
    given = material(tmp_path, 100, 40)
    for rows in (*given.blocks(), *given.shuffled(9, seed=0, pool_rows=32)):
        assert torch.equal(rows.base_ND, -rows.tuned_ND)
        assert torch.equal(rows.difference_ND, -2 * rows.base_ND)
        assert rows.token_N.tolist() == numbers([rows])
        place_N = rows.token_N - 1000 * rows.corpus_N
        assert (rows.sequence_N * LENGTH + rows.position_N == place_N).all()
        assert ((rows.role_N == place_N % 5) & (rows.template_N == (place_N % 3 == 0))).all()


@pytest.mark.parametrize("pool_rows", [1, 40, 10_000])
def test_every_row_comes_once_an_epoch_in_full_batches(tmp_path: Path, pool_rows: int) -> None:
    given = material(tmp_path, 100, 43)
    batches = list(given.shuffled(12, seed=0, epochs=2, pool_rows=pool_rows))
    assert {len(rows) for rows in batches[:-1]} == {12}
    assert sorted(numbers(batches)) == sorted(2 * numbers(list(given.blocks())))
    assert sorted(numbers(batches)[:143]) == sorted(numbers(list(given.blocks()))), "no row twice before all came once"


def test_order_is_random_and_a_function_of_the_seed(tmp_path: Path) -> None:
    given = material(tmp_path, 300)
    one, same, other = (numbers(list(given.shuffled(10, seed=seed))) for seed in (0, 0, 1))
    assert one == same != other
    assert abs(np.corrcoef(one, np.arange(300))[0, 1]) < 0.2


def test_every_pool_holds_corpora_in_proportion(tmp_path: Path) -> None:
    given = material(tmp_path, 20 * GROUP, 10 * GROUP)
    batches = list(given.shuffled(6 * GROUP, seed=0, pool_rows=6 * GROUP))
    assert {int((rows.corpus_N == 1).sum()) for rows in batches} <= {GROUP, 2 * GROUP, 3 * GROUP}


def test_an_endless_stream_goes_on_after_an_epoch(tmp_path: Path) -> None:
    stream = material(tmp_path, 30).shuffled(20, seed=0, epochs=None)
    assert [len(next(stream)) for _ in range(5)] == [20] * 5


def test_first_tokens_are_left_out_of_every_sequence_and_of_no_neighbour(tmp_path: Path) -> None:
    """The toolkit marked start + i for every sequence, so that a short one masked its neighbour's tokens."""
    given = material(tmp_path, 34).of(Selection(first_position=6))
    assert sorted(numbers(list(given.shuffled(4, seed=0)))) == [n for n in range(34) if n % LENGTH >= 6]


def test_roles_and_template_are_predicates(tmp_path: Path) -> None:
    given = material(tmp_path, 60)
    kept = numbers(list(given.of(Selection(roles=("user", "assistant"), template=False)).blocks()))
    roles = [activation_pairs.ROLES.index(role) for role in ("user", "assistant")]
    assert kept == [n for n in range(60) if n % 5 in roles and n % 3]


def test_held_out_rows_are_whole_sequences_and_never_fitted_on(tmp_path: Path) -> None:
    given = material(tmp_path, 2000)
    fit, held_out = (numbers(list(given.of(Selection(part=part, held_out_share=0.3)).blocks())) for part in ("fit", "held_out"))
    assert sorted(fit + held_out) == list(range(2000))
    assert not {n // LENGTH for n in fit} & {n // LENGTH for n in held_out}
    assert 0.15 < len(held_out) / 2000 < 0.45


def test_moments_equal_numpy(tmp_path: Path) -> None:
    given = material(tmp_path, 100, 40)
    value = np.asarray(numbers(list(given.blocks())), np.float64)
    for name, factor in (("base", 1), ("tuned", -1), ("difference", -2)):
        moments = given.moments()[name]
        np.testing.assert_allclose(moments.mean_D, factor * value.mean(), rtol=1e-12)
        np.testing.assert_allclose(moments.variance_D(), factor**2 * value.var(), rtol=1e-12)


def test_files_of_different_tokens_are_refused_with_the_row(tmp_path: Path) -> None:
    base, other = stored(tmp_path / "a", 40, 0, 1), stored(tmp_path / "b", 40, 5, 1)
    pair = PairedFile.open("texts", base, other)
    with pytest.raises(StorageError, match=r"row 16 of .*a and of .*b are different tokens \(token\)"):
        pair.rows(16, 32, 0)


def test_files_of_different_size_are_refused(tmp_path: Path) -> None:
    base, short = stored(tmp_path / "a", 40, 0, 1), stored(tmp_path / "b", 39, 0, 1)
    with pytest.raises(StorageError, match=r"do not belong together: n_rows is 40 and 39"):
        PairedFile.open("texts", base, short)


def test_a_fingerprint_is_of_the_stored_bytes_not_of_names_or_selection(tmp_path: Path) -> None:
    given, again = (material(tmp_path / name, 100, 40) for name in ("one", "again"))
    assert given.fingerprint == again.fingerprint == given.of(Selection(first_position=3)).fingerprint
    other = [PairedFile.open("x", stored(tmp_path / "b", 100, 1, 1), stored(tmp_path / "t", 100, 1, -1)), given.files[1]]
    found = [given, PairedActivations(other), PairedActivations(given.files[:1]), PairedActivations(given.files[::-1])]
    assert len({each.fingerprint for each in found}) == 4
