"""The code of a dictionary as its active entries: what follows from it costs by the latents that are active, not by all.

Suffixes: N tokens, F latents, A active entries (token by token), D width.
"""

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from diffing_core.lazy import torch


@dataclass(frozen=True)
class SparseCode:
    """Entries [A] in the order of tokens: latent and value; `start_N1` says where each token's entries begin."""

    start_N1: Any
    latent_A: Any
    value_A: Any
    n_latents: int

    @classmethod
    def of(cls, code_NF: Any) -> "SparseCode":
        """The entries of a dense code that are above zero."""
        return cls.above(code_NF, code_NF.new_zeros(code_NF.shape[1]))

    @classmethod
    def above(cls, code_NF: Any, bound_F: Any) -> "SparseCode":
        """The entries above their latent's bound."""
        mask_NF = code_NF > bound_F
        if code_NF.device.type == "cpu":  # NumPy finds the places ten times faster
            place_A = torch.from_numpy(np.flatnonzero(mask_NF.numpy()))
        else:
            place_A = mask_NF.reshape(-1).nonzero().squeeze(1)
        start_N1 = torch.zeros(len(code_NF) + 1, dtype=torch.int64, device=code_NF.device)
        start_N1[1:] = mask_NF.sum(1).cumsum(0)
        return cls(start_N1, place_A % code_NF.shape[1], code_NF.reshape(-1)[place_A], code_NF.shape[1])

    def __len__(self) -> int:
        return len(self.start_N1) - 1

    @cached_property
    def row_A(self) -> Any:
        """Number of each entry's token."""
        counts_N = self.start_N1.diff()
        return torch.repeat_interleave(torch.arange(len(self), device=counts_N.device), counts_N)

    def sums(self, value_A: Any | None = None) -> Any:
        """Sum per latent of a number of each entry, by default how many there are; float64 [F]."""
        each_A = torch.ones_like(self.value_A) if value_A is None else value_A
        return torch.bincount(self.latent_A, each_A.double(), minlength=self.n_latents).double()

    def maxima(self) -> Any:
        """Largest value of each latent, [F]; zero where it is silent."""
        return self.value_A.new_zeros(self.n_latents).scatter_reduce_(0, self.latent_A, self.value_A, "amax")

    def times(self, matrix_FD: Any) -> Any:
        """code · matrix, [N, D]: what a decoder makes of it."""
        return _product(self.start_N1, self.latent_A, self.value_A, matrix_FD)

    def transposed_times(self, matrix_ND: Any) -> Any:
        """codeᵀ · matrix, [F, D]: for each latent the sum of rows, weighted by its values."""
        return _product(*self._transposed, matrix_ND)

    @cached_property
    def _transposed(self) -> tuple[Any, Any, Any]:
        """The entries in the order of latents: where each latent's begin, tokens, values."""
        order_A = self.latent_A.argsort(stable=True)
        start_F1 = torch.zeros(self.n_latents + 1, dtype=torch.int64, device=order_A.device)
        start_F1[1:] = torch.bincount(self.latent_A, minlength=self.n_latents).cumsum(0)
        return start_F1, self.row_A[order_A], self.value_A[order_A]


def _product(start_R1: Any, column_A: Any, value_A: Any, matrix_CD: Any) -> Any:
    with warnings.catch_warnings():  # torch calls this layout a beta, once per process
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
        shape = (len(start_R1) - 1, len(matrix_CD))
        return torch.sparse_csr_tensor(start_R1, column_A, value_A, shape, check_invariants=False) @ matrix_CD
