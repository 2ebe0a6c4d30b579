"""Dictionaries of activations: an atom is the unit vector of a real token that the atoms so far could not express.

    a token is expressed     cos(x, x̂) ≥ min_cosine, x̂ its code of at most `steps` atoms
    a pass                   all tokens once, in batches; those not expressed become atoms, near-duplicates of a batch once
    saturated                passes are repeated until one adds next to nothing: greedy codes are not monotone in the
                             dictionary, so that a single pass leaves much to add
    staged                   then the tuned model's vectors of the same tokens are passed, all base atoms staying as they
                             are: what is added could not be said with base atoms. The null is one more pass of the base

The published threshold is a mean squared error over dimensions, 2 (1 − cos) / D, which cannot exceed 4 / D: its documented
value adds no atom at some widths. A cosine means the same at every width.

Reference: https://arxiv.org/abs/2505.17769; staging, saturation and null are this project's.

Suffixes: N tokens, D width, I atoms, A candidates of a batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffing_core.lazy import torch
from diffing_core.pursuit import Pursuit

Advance = Callable[..., None]


def _unwatched(_n_tokens: int, **_measures: float) -> None:
    """For who shows no progress."""


@dataclass(frozen=True)
class Construction:
    """How a dictionary is built.

    Attributes:
        pursuit: how tokens are expressed.
        min_cosine: a token less well expressed becomes an atom.
        batch_rows: tokens judged by the same atoms.
        max_atoms: atoms of the base at most; each later pass may add as many again.
        max_passes: over the base at most, the null's not counted.
        settled_share: a pass that adds no more atoms than this share of the dictionary ends the construction.
    """

    pursuit: Pursuit
    min_cosine: float
    batch_rows: int = 256
    max_atoms: int = 4096
    max_passes: int = 10
    settled_share: float = 0.0


@dataclass(frozen=True)
class Dictionary:
    """I unit atoms [I, D] and the number of the token that each of them is, int64 [I]."""

    atom_ID: Any
    token_I: np.ndarray

    def __len__(self) -> int:
        return len(self.token_I)

    @classmethod
    def empty(cls, like_ND: Any) -> "Dictionary":
        """No atoms yet, of the width, format and place of these vectors."""
        return cls(like_ND[:0], np.zeros(0, np.int64))

    def with_atoms(self, atom_AD: Any, token_A: np.ndarray) -> "Dictionary":
        """These after the atoms that there are."""
        return Dictionary(torch.cat([self.atom_ID, atom_AD]), np.concatenate([self.token_I, token_A]))

    def first(self, n_atoms: int) -> "Dictionary":
        """The oldest atoms."""
        return Dictionary(self.atom_ID[:n_atoms], self.token_I[:n_atoms])


@dataclass(frozen=True)
class Staged:
    """A dictionary of the base and what the tuned model adds to it.

    Attributes:
        whole: base atoms, then those that the tuned model added.
        n_base: how many are the base's.
        n_after_pass: atoms after each pass over the base.
        null_token_I: tokens that one more pass over the base would have added.
    """

    whole: Dictionary
    n_base: int
    n_after_pass: tuple[int, ...]
    null_token_I: np.ndarray

    @property
    def base(self) -> Dictionary:
        """The base's atoms."""
        return self.whole.first(self.n_base)

    @property
    def added_token_I(self) -> np.ndarray:
        """Tokens that the tuned model added."""
        return self.whole.token_I[self.n_base :]

    @property
    def new_I(self) -> np.ndarray:
        """Numbers of the added atoms whose token one more pass over the base would not have added too."""
        return self.n_base + np.flatnonzero(~np.isin(self.added_token_I, self.null_token_I))


def unit(row_ND: Any) -> Any:
    """Rows of length 1; zero rows stay zero."""
    return torch.nn.functional.normalize(row_ND, dim=1)


def usable(token_N: np.ndarray, norms_SN: np.ndarray, special: Sequence[int]) -> np.ndarray:
    """Which tokens may become atoms, bool [N]: none with a special id, or without a direction in some model.

    Tokens of outlying norm (whatever a model parks its attention on) are left out before, when rows are read.
    """
    return ~np.isin(token_N, list(special)) & (norms_SN > 0).all(0)


def grown(start: Dictionary, unit_ND: Any, how: Construction, advance: Advance = _unwatched) -> Dictionary:
    """One pass: `start` and the tokens among N that neither it nor what it grew to expresses; at most `max_atoms` more.

    `start` is asked too because a greedy code may be worse for atoms added meanwhile: without that, half the tokens added in
    a later pass can be ones that `start` says well.

    An empty dictionary begins with the first tokens that are no near-duplicates of each other, as many as there are
    dimensions.
    """
    found, limit = start, len(start) + how.max_atoms
    if not len(found):
        first_ND = unit_ND[: how.batch_rows]
        found = _with_new(found, first_ND, np.arange(len(first_ND)), how, min(limit, unit_ND.shape[1]))
    for begin in range(0, len(unit_ND), how.batch_rows):
        batch_ND = unit_ND[begin : begin + how.batch_rows]
        if len(found) < limit:
            poor_A = _not_expressed(batch_ND, found, how)
            if len(found) > len(start):
                poor_A = poor_A[_not_expressed(batch_ND[poor_A], start, how)]
            found = _with_new(found, batch_ND[poor_A], begin + poor_A, how, limit)
        advance(len(batch_ND), atoms=len(found))
    return found


def saturated(unit_ND: Any, how: Construction, advance: Advance = _unwatched) -> tuple[Dictionary, tuple[int, ...]]:
    """Passes until one adds next to nothing, or `max_passes`; with the atoms after each pass."""
    found, sizes = Dictionary.empty(unit_ND), [0]
    for _ in range(how.max_passes):
        room = how.max_atoms - len(found)
        if room <= 0:
            break
        found = grown(found, unit_ND, how, advance).first(how.max_atoms)
        sizes.append(len(found))
        if sizes[-1] - sizes[-2] <= how.settled_share * sizes[-1]:
            break
    return found, tuple(sizes[1:])


def staged(base_ND: Any, tuned_ND: Any, how: Construction, advance: Advance = _unwatched) -> Staged:
    """The dictionary of the base, the null pass, and the pass over the tuned model's vectors of the same N tokens."""
    base, sizes = saturated(base_ND, how, advance)
    null = grown(base, base_ND, how, advance)
    whole = grown(base, tuned_ND, how, advance)
    return Staged(whole, len(base), sizes, null.token_I[len(base) :])


def jaccard(left: np.ndarray, right: np.ndarray) -> float:
    """Tokens that are atoms of both over those of either; 1 if neither has any."""
    n_both = len(np.intersect1d(left, right))
    return n_both / max(len(np.union1d(left, right)), 1) if len(left) or len(right) else 1.0


def _not_expressed(row_ND: Any, atoms: Dictionary, how: Construction) -> np.ndarray:
    """Which of the rows the atoms do not express, as numbers."""
    expressed_N = how.pursuit.expresses(row_ND, atoms.atom_ID, how.min_cosine) if len(row_ND) else torch.zeros(0, dtype=torch.bool)
    return np.flatnonzero(~expressed_N.cpu().numpy())


def _with_new(found: Dictionary, row_AD: Any, token_A: np.ndarray, how: Construction, limit: int) -> Dictionary:
    """Candidates that no earlier one of the batch could stand for alone, until there are `limit` atoms."""
    if not len(token_A):
        return found
    cosine_AA = row_AD @ row_AD.T
    near_AA = ((cosine_AA if how.pursuit.non_negative else cosine_AA.abs()) >= how.min_cosine).cpu().numpy()
    kept: list[int] = []
    covered_A = np.zeros(len(token_A), bool)
    for index in range(len(token_A)):
        if not covered_A[index] and len(found) + len(kept) < limit:
            kept.append(index)
            covered_A |= near_AA[index]
    return found.with_atoms(row_AD[kept], token_A[kept])
