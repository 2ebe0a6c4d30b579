"""Which model a latent may read and write: one kind of crosscoder or another by three arrays over the latents.

    plain              every latent in both models
    dedicated          a block in the base only, a block in the tuned model only, the rest in both; what a latent is
                       barred from stays exactly zero (Dedicated Feature Crosscoder, arXiv 2602.11729)
    designated_shared  a block has one decoder for both models and pays less for being active (Anthropic, February
                       2025): it takes up what the models share, so that other latents need not

Lighter sparsity of the shared block: under L1 its penalty is multiplied by `shared_sparsity`; a soft threshold
lower by that factor is the same as a score higher by its inverse, which is what BatchTopK selects by. There the latents
compete for k: at 0.15, as published for L1, a shared block with room for k leaves the others silent (docs/decisions.md).

Suffixes: M models (base, tuned), F latents.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

Kind = Literal["plain", "dedicated", "designated_shared"]
OWNERS = ("both", "base", "tuned", "shared")


@dataclass(frozen=True)
class Partition:
    """`owner_F`: index into OWNERS for every latent; `shared_sparsity`: what a shared one pays, of what others do."""

    owner_F: np.ndarray
    shared_sparsity: float = 1.0

    @classmethod
    def of(cls, kind: Kind, n_latents: int, share: float, shared_sparsity: float) -> "Partition":
        """`share`: of the latents, in each dedicated block or in the shared one, rounded to whole latents.

        Raises:
            ValueError: the two dedicated blocks leave no latent to both models.
        """
        owner_F = np.zeros(n_latents, np.int8)
        block = round(share * n_latents)
        if kind == "dedicated":
            if 2 * block >= n_latents:
                raise ValueError(f"two dedicated blocks of {block} leave none of {n_latents} latents to both; lower the share")
            owner_F[:block], owner_F[block : 2 * block] = OWNERS.index("base"), OWNERS.index("tuned")
        elif kind == "designated_shared":
            owner_F[:block] = OWNERS.index("shared")
        return cls(owner_F, shared_sparsity)

    @property
    def allowed_MF(self) -> np.ndarray:
        """Whether a latent may read and write a model, bool [2, F]."""
        return np.stack([self.owner_F != OWNERS.index("tuned"), self.owner_F != OWNERS.index("base")])

    @property
    def tied_F(self) -> np.ndarray:
        """Latents with one decoder for both models."""
        return self.owner_F == OWNERS.index("shared")

    @property
    def sparsity_F(self) -> np.ndarray:
        """What being active costs a latent, float32: 1, or less for shared ones."""
        return np.where(self.tied_F, self.shared_sparsity, 1.0).astype(np.float32)
