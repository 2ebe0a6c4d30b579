"""The sample of tokens: as large as asked, spread evenly, and the same for every batch size."""

import numpy as np
import pytest

from diffing_core.sampling import sampled

SEQUENCE_N, POSITION_N = (each.reshape(-1) for each in np.mgrid[:500, :200])


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
def test_share_is_kept_overall_and_at_every_sequence_and_position(share: float) -> None:
    chosen = sampled(SEQUENCE_N, POSITION_N, share).reshape(500, 200)
    spread = np.sqrt(share * (1 - share))
    assert chosen.mean() == pytest.approx(share, abs=5 * spread / np.sqrt(chosen.size))
    assert np.abs(chosen.mean(0) - share).max() < 5 * spread / np.sqrt(500)
    assert np.abs(chosen.mean(1) - share).max() < 5 * spread / np.sqrt(200)


def test_neighbours_are_drawn_independently() -> None:
    chosen = sampled(SEQUENCE_N, POSITION_N, 0.5).reshape(500, 200).astype(float) - 0.5
    assert abs((chosen[:, 1:] * chosen[:, :-1]).mean()) < 0.25 * 5 / np.sqrt(chosen.size)
    assert abs((chosen[1:] * chosen[:-1]).mean()) < 0.25 * 5 / np.sqrt(chosen.size)


def test_a_token_is_chosen_or_not_whatever_comes_with_it() -> None:
    whole = sampled(SEQUENCE_N, POSITION_N, 0.2)
    order = np.random.default_rng(0).permutation(len(whole))
    parts = [sampled(SEQUENCE_N[part], POSITION_N[part], 0.2) for part in np.array_split(order, 37)]
    assert (np.concatenate(parts) == whole[order]).all()


def test_a_larger_share_keeps_the_smaller_sample() -> None:
    small, large = (sampled(SEQUENCE_N, POSITION_N, share) for share in (0.1, 0.3))
    assert not (small & ~large).any()


def test_all_and_none() -> None:
    assert sampled(SEQUENCE_N, POSITION_N, 1.0).all()
    assert sampled(SEQUENCE_N, POSITION_N, 7.0).all()
    assert not sampled(SEQUENCE_N, POSITION_N, 0.0).any()
    assert sampled(SEQUENCE_N, POSITION_N, 1 - 2**-53).mean() > 0.999
    assert len(sampled(SEQUENCE_N[:0], POSITION_N[:0], 0.5)) == 0


def test_the_first_token_of_the_first_sequence_is_sampled_like_any_other() -> None:
    """It used to mix to 0, which is below every share."""
    assert not sampled(np.zeros(1, np.int64), np.zeros(1, np.int64), 0.01)[0]
