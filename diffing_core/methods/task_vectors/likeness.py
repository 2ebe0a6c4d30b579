"""Sums over the tensors of two task vectors, from which cosine and overlap follow once at the end.

    cosine  = Σ⟨ΔW₁, ΔW₂⟩ / √(Σ‖ΔW₁‖² Σ‖ΔW₂‖²)        over tensors; never a mean of cosines per tensor
    overlap = Σ‖U₁ᵀU₂‖_F² / Σk, random Σ(k²/m) / Σk      of the spaces of all matrices laid side by side

Tensors that only one of the two changes count in its length. Of vocabularies of different size the common rows count.
"""

from dataclasses import dataclass, fields
from typing import Any

from diffing_core.methods.task_vectors.task_tensor import Space, TaskTensor


@dataclass
class Likeness:
    """The sums of two task vectors, or of one part of them; `+` joins those of several parts."""

    n_tensors: int = 0
    inner: float = 0.0
    own: float = 0.0
    peer: float = 0.0
    rank: int = 0
    left: float = 0.0
    right: float = 0.0
    left_random: float = 0.0
    right_random: float = 0.0

    def add_pair(self, own: TaskTensor, peer: TaskTensor, spaces: tuple[Space, Space] | None) -> None:
        """Adds a tensor that both change: lengths are added apart."""
        self.n_tensors += 1
        self.inner += own.inner(peer)
        if spaces is not None:
            k = min(len(space.sigma_K) for space in spaces)
            one, two = (space.first(k) for space in spaces)
            self.rank += k
            self.left += one.left_overlap(two)
            self.right += one.right_overlap(two)
            self.left_random += k * k / own.shape[0]
            self.right_random += k * k / own.shape[1]

    def __add__(self, other: "Likeness") -> "Likeness":
        return Likeness(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))

    def row(self) -> dict[str, Any]:
        """The columns that all likeness tables share."""
        length = (self.own * self.peer) ** 0.5
        shares = {
            "left_overlap": self.left,
            "left_expected": self.left_random,
            "right_overlap": self.right,
            "right_expected": self.right_random,
        }
        return {
            "n_tensors": self.n_tensors,
            "norm": self.own**0.5,
            "peer_norm": self.peer**0.5,
            "cosine": self.inner / length if length else None,
            "overlap_rank": self.rank,
            **{name: value / self.rank if self.rank else None for name, value in shares.items()},
        }
