"""Choosing a share of the tokens by what they are, not by when they come."""

import numpy as np


def sampled(sequence_N: np.ndarray, position_N: np.ndarray, share: float) -> np.ndarray:
    """Which tokens belong to a sample of about this share, bool [N].

    Decided by a hash of (sequence, position) (the finaliser of SplitMix64), so the same tokens are
    chosen whatever the batch size or the order of blocks.
    """
    if share >= 1:
        return np.ones(len(sequence_N), bool)
    with np.errstate(over="ignore"):
        mixed = (sequence_N.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + position_N.astype(np.uint64)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return mixed < np.uint64(share * 2**64)
