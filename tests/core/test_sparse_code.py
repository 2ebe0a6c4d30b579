"""Active entries of a code: the same numbers as the dense code, however few or many there are."""

import pytest
import torch

from diffing_core.sparse_code import SparseCode, mask_of_largest


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_products_sums_and_maxima_equal_the_dense_ones(share: float) -> None:
    draw = torch.Generator().manual_seed(0)
    code_NF = torch.rand(9, 5, generator=draw) * (torch.rand(9, 5, generator=draw) < share)
    code = SparseCode.of(code_NF)
    decoder_FD, target_ND = torch.randn(5, 3, generator=draw), torch.randn(9, 4, generator=draw)
    torch.testing.assert_close(code.times(decoder_FD), code_NF @ decoder_FD)
    torch.testing.assert_close(code.transposed_times(target_ND), code_NF.T @ target_ND)
    assert len(code) == 9
    assert code.row_A.tolist() == code_NF.nonzero()[:, 0].tolist()
    assert code.sums().tolist() == (code_NF > 0).sum(0).tolist()
    torch.testing.assert_close(code.sums(code.value_A), code_NF.double().sum(0))
    assert torch.equal(code.maxima(), code_NF.max(0).values)


def test_every_latent_has_its_own_bound() -> None:
    code = SparseCode.above(torch.tensor([[1.0, 1.0, -1.0], [0.5, 3.0, 0.0]]), torch.tensor([0.6, 2.0, torch.inf]))
    assert (code.row_A.tolist(), code.latent_A.tolist(), code.value_A.tolist()) == ([0, 1], [0, 1], [1.0, 3.0])


@pytest.mark.parametrize("n_kept", [1, 40, 4000, 30_000, 100 * 512])
@pytest.mark.parametrize("shape", ["positive part", "few positive", "many equal", "ascending"])
def test_exactly_the_largest_are_kept_whatever_a_sample_of_them_says(shape: str, n_kept: int) -> None:
    draw = torch.Generator().manual_seed(0)
    score_NF = torch.randn(100, 512, generator=draw)
    score_NF = {
        "positive part": score_NF.relu(),
        "few positive": (score_NF - 3).relu(),
        "many equal": score_NF.round().relu(),
        "ascending": torch.arange(score_NF.numel()).float().view_as(score_NF),  # what is large lies together
    }[shape]
    mask_NF = mask_of_largest(score_NF, n_kept)
    assert mask_NF.unique().tolist() in ([0.0, 1.0], [1.0])
    assert int(mask_NF.sum()) == n_kept
    kept_X, expected_X = (each.sort().values for each in (score_NF[mask_NF > 0], score_NF.flatten().topk(n_kept).values))
    assert torch.equal(kept_X, expected_X)
