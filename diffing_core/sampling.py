"""Choosing tokens by what they are, not by when they come: the same ones whatever the batches and their order.

With `ProbeCorpus.key_S` as keys a choice does not depend on the order of the documents either.
"""

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def sampled(key_N: np.ndarray, position_N: np.ndarray, share: float) -> np.ndarray:
    """Which tokens belong to a sample of about this share, bool [N]; decided by a hash of (key of the sequence, position)."""
    if share >= 1:
        return np.ones(len(key_N), bool)
    with np.errstate(over="ignore"):
        mixed_N = (key_N.astype(np.uint64) + np.uint64(1)) * GOLDEN + position_N.astype(np.uint64)
        return _finalised(mixed_N) < np.uint64(share * 2**64)


def position_hash(key_N: np.ndarray, position_N: np.ndarray, seed: int) -> np.ndarray:
    """64 well-mixed bits per (seed, key of the sequence, position), uint64 [N]."""
    with np.errstate(over="ignore"):
        mixed_N = _finalised(np.full(len(key_N), seed, np.uint64) + GOLDEN)
        for part_N in (key_N, position_N):
            mixed_N = _finalised((mixed_N ^ part_N.astype(np.uint64)) + GOLDEN)
    return mixed_N


def _finalised(key_N: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    key_N = (key_N ^ (key_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    key_N = (key_N ^ (key_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return key_N ^ (key_N >> np.uint64(31))
