"""A change turned at random: as large as it was, with directions that nothing has taught. A null control.

    low rank   ΔW = L R  ->  (Q_M L)(R Q_N)    Q_M, Q_N uniform among rotations and reflections; never formed
    dense      ΔW        ->  S_M ΔW S_N        S a permutation of rows or columns with signs, at random

Both are orthogonal on either side, so every matrix keeps all its singular values, and a vector its length. Only a frame of R
columns of Q_M is drawn, which with L = Q_L U gives the same: Q_M L = (Q_M Q_L) U. The seed, the tensor's name and
what changed in it decide, so that no two finetunes are turned alike.

Suffixes: M rows (outputs), N columns (inputs), R rank.
"""

import hashlib
from typing import Any

from diffing_core.lazy import torch
from diffing_core.spectra import Factors

SAMPLED_VALUES = 1024


def turned(change: "Factors | Any", seed: int, name: str, expert: int | None = None) -> "Factors | Any":
    """The change of one tensor, turned at random on all its sides."""
    digest = hashlib.sha256(f"{seed} {name} {expert}".encode() + _some_of(change)).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    if isinstance(change, Factors):
        return Factors(_rotated(change.left_MR, generator), _rotated(change.right_RN.T, generator).T)
    for side, length in enumerate(change.shape):
        signs = torch.randint(2, (length,), generator=generator) * 2 - 1
        shape = [length if each == side else 1 for each in range(change.ndim)]
        change = change.index_select(side, torch.randperm(length, generator=generator)) * signs.reshape(shape)
    return change


def _some_of(change: "Factors | Any") -> bytes:
    """Some of its values, from all over it."""
    values = (change.left_MR if isinstance(change, Factors) else change).flatten()
    return values[:: max(1, len(values) // SAMPLED_VALUES)].float().contiguous().numpy().tobytes()


def _rotated(left_MR: Any, generator: Any) -> Any:
    """Q L with a uniformly random orthogonal Q, float32."""
    basis_MR, upper_RR = torch.linalg.qr(left_MR.double())
    frame_MR, mixed_RR = torch.linalg.qr(torch.randn(basis_MR.shape, generator=generator, dtype=torch.float64))
    signs_R = mixed_RR.diagonal().sgn()  # makes the frame uniform: the signs of a QR are a convention
    return ((frame_MR * signs_R) @ upper_RR).float()
