"""A change turned at random: the same singular values, other directions, the same ones for the same seed."""

import pytest
import torch
from safetensors.torch import load_file

from diffing_core.spectra import Factors
from diffing_core.weight_edits import AdapterEdit, Term, WeightEdit, term_of, uniform
from diffing_core.weight_edits.folders import write_terms
from diffing_core.weight_edits.turning import turned
from diffing_core.weights import WeightPair, weight_stream
from tests import model_files


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense(change: "Factors | torch.Tensor") -> torch.Tensor:
    return change.dense() if isinstance(change, Factors) else change


@pytest.mark.parametrize("change", [Factors(draw(90, 3), draw(3, 70)), Factors(draw(2, 5), draw(5, 9)), draw(90, 70), draw(40, 200)])
def test_singular_values_stay_and_directions_do_not(change):
    found = dense(turned(change, 1, "layers.0.mlp.up_proj.weight")).double()
    before = dense(change).double()
    assert found.shape == before.shape
    torch.testing.assert_close(torch.linalg.svdvals(found), torch.linalg.svdvals(before), rtol=1e-5, atol=1e-4)
    assert abs((found * before).sum()) < 0.6 * before.square().sum()


@pytest.mark.parametrize("change", [Factors(draw(200, 4), draw(4, 300)), draw(200, 4) @ draw(4, 300)], ids=["factors", "dense"])
def test_both_sides_are_as_far_from_the_old_ones_as_random_spaces(change):
    spaces = [torch.linalg.svd(dense(each).double()) for each in (change, *(turned(change, seed, "w") for seed in range(20)))]
    for side, length in ((0, 200), (2, 300)):
        bases = [each[side][:, :4] if side == 0 else each[side][:4].T for each in spaces]
        overlaps = [(bases[0].T @ other).square().sum().item() / 4 for other in bases[1:]]
        assert sum(overlaps) / 20 == pytest.approx(4 / length, rel=0.5)


def test_two_finetunes_are_not_turned_alike():
    """Else the nulls of all adapters of one rank would lie in one and the same space."""
    changes = [Factors(draw(200, 4, seed=seed), draw(4, 300, seed=seed + 1)) for seed in (0, 10)]
    one, other, again = (turned(change, 0, "w") for change in (*changes, changes[0]))
    torch.testing.assert_close(one.dense(), again.dense())
    bases = [torch.linalg.qr(each.left_MR.double())[0] for each in (one, other)]
    assert (bases[0].T @ bases[1]).square().sum() / 4 < 0.1


def test_vectors_keep_their_length_and_stacks_are_told_apart():
    vector = draw(50)
    assert turned(vector, 0, "norm.weight").norm() == pytest.approx(vector.norm())
    assert turned(torch.tensor(2.0), 0, "gate").abs() == 2
    matrix = draw(9, 9)
    assert torch.equal(turned(matrix, 0, "a"), turned(matrix, 0, "a"))
    for seed, name, expert in ((1, "a", None), (0, "b", None), (0, "a", 0)):
        assert not torch.equal(turned(matrix, seed, name, expert), turned(matrix, 0, "a"))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_turned_finetune_is_written_as_any_other(tmp_path, kind):
    base = model_files.save_base(tmp_path / "base", tie_word_embeddings=False)
    if kind == "lora":
        tuned = model_files.save_adapter(tmp_path / "tuned", base, seed=1)
    else:
        tuned = model_files.save_base(tmp_path / "tuned", seed=1, tie_word_embeddings=False)
    pair = WeightPair.of_folders(base, tuned)
    (tmp_path / "out").mkdir()
    assert write_terms(tmp_path / "out", [Term(pair, uniform(2.0), turn_seed=3)]) == kind
    if kind == "lora":
        streams = (weight_stream(WeightPair.of_folders(base, folder)) for folder in (tuned, tmp_path / "out"))
        for own, other in zip(*streams, strict=True):
            assert own.name == other.name
            sigma = [each.factors.spectrum().sigma_K for each in (own, other)]
            torch.testing.assert_close(sigma[1], 2 * sigma[0], rtol=1e-4, atol=1e-6)
            assert abs(other.factors.inner(own.factors.dense())) < 0.5 * sigma[0].norm() * sigma[1].norm()
        return
    before, after, other = (load_file(folder / "model.safetensors") for folder in (base, tuned, tmp_path / "out"))
    for key, value in before.items():
        sizes = [(each[key] - value).norm().item() for each in (after, other)]
        assert sizes[1] == pytest.approx(2 * sizes[0], rel=1e-4)
        assert not torch.allclose(other[key] - value, 2 * (after[key] - value), atol=1e-3)


def test_a_specification_may_ask_for_it():
    edit = WeightEdit(name="control", adapters=[{"organism": "cake_bake", "turn_seed": 4}])
    assert [each.turn_seed for each in edit.effective()] == [4]
    assert term_of(AdapterEdit(turn_seed=4), None).turn_seed == 4
