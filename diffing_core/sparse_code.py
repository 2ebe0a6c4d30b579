"""The code of a dictionary as its active entries: what follows from it costs by the latents that are active, not by all.

Suffixes: N tokens, F latents, A active entries (token by token), D width.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from diffing_core.lazy import torch

SAMPLED_EVERY = 61  # scores; a prime, so that a sample has all latents in it


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
        n_tokens, n_latents = code_NF.shape
        first_N1 = torch.arange(n_tokens + 1, device=code_NF.device) * n_latents
        start_N1 = torch.searchsorted(place_A, first_N1)  # a sum over the mask would read it again, as numbers
        return cls(start_N1, place_A % n_latents, code_NF.reshape(-1)[place_A], n_latents)

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

    def times(self, matrix_FD: Any, plus_D: Any | None = None) -> Any:
        """code · matrix, [N, D], plus a row: what a decoder makes of it."""
        code_NF = _csr(self.start_N1, self.latent_A, self.value_A, self.n_latents)
        return code_NF @ matrix_FD if plus_D is None else torch.addmm(plus_D.expand(len(self), -1), code_NF, matrix_FD)

    def transposed_times(self, matrix_ND: Any) -> Any:
        """codeᵀ · matrix, [F, D]: for each latent the sum of rows, weighted by its values."""
        return _csr(*self._transposed, len(self)) @ matrix_ND

    def transposed_into(self, room_XFD: Any, matrices_XND: Sequence[Any], latents: slice) -> None:
        """codeᵀ · each matrix for a stretch of the latents, written over `room_XFD`: without any new memory of its size."""
        start_F1, token_A, value_A = self._transposed
        start_F1 = start_F1[latents.start : latents.stop + 1]
        entries = slice(int(start_F1[0]), int(start_F1[-1]))
        code_FN = _csr(start_F1 - start_F1[0], token_A[entries], value_A[entries], len(self))
        for room_FD, matrix_ND in zip(room_XFD, matrices_XND, strict=True):
            torch.addmm(room_FD, code_FN, matrix_ND, beta=0, out=room_FD)

    @cached_property
    def _transposed(self) -> tuple[Any, Any, Any]:
        """The entries in the order of latents: where each latent's begin, tokens, values."""
        order_A = self.latent_A.argsort(stable=True)
        start_F1 = torch.zeros(self.n_latents + 1, dtype=torch.int64, device=order_A.device)
        start_F1[1:] = torch.bincount(self.latent_A, minlength=self.n_latents).cumsum(0)
        return start_F1, self.row_A[order_A], self.value_A[order_A]


def mask_of_largest(score_NF: Any, n_kept: int) -> Any:
    """1.0 at the largest scores of all, exactly so many even among equals, else 0.0."""
    score_X = score_NF.reshape(-1)
    if score_X.device.type == "cpu":
        kept = torch.from_numpy(_largest(score_X.numpy(), n_kept))
    else:
        kept = score_X.topk(n_kept, sorted=False).indices
    return torch.zeros_like(score_X).index_fill_(0, kept, 1.0).view_as(score_NF)


def _largest(score_X: np.ndarray, n_kept: int) -> np.ndarray:
    """Places of the largest, on a processor.

    Selection branches at every value, and on scores it has not met it guesses wrongly: 190 ms (torch) and 750 ms (NumPy) for
    2048 × 8192. So a sample says what is surely too small, and a selection among the rest takes a tenth of that.
    """
    sample_Y = score_X[::SAMPLED_EVERY]
    n_above = 2 * n_kept // SAMPLED_EVERY + 10
    if n_above < len(sample_Y):
        bound = np.partition(sample_Y, len(sample_Y) - n_above)[len(sample_Y) - n_above]
        likely = np.flatnonzero(score_X > bound)
        if len(likely) >= n_kept:
            return likely[_last(score_X[likely], n_kept)]
    return _last(score_X, n_kept)


def _last(score_X: np.ndarray, n_kept: int) -> np.ndarray:
    first = len(score_X) - n_kept
    return np.argpartition(score_X, first)[first:] if first else np.arange(n_kept)


def _csr(start_R1: Any, column_A: Any, value_A: Any, n_columns: int) -> Any:
    with warnings.catch_warnings():  # torch calls this layout a beta, once per process
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
        return torch.sparse_csr_tensor(start_R1, column_A, value_A, (len(start_R1) - 1, n_columns), check_invariants=False)
