"""Latent Scaling: how much of a latent's direction is there in each model, whatever norm the decoder came to have.

For latent j with activations f_j(x) and a direction d_j, the best multiple of f_j d_j that explains a target Y is

    β_j(Y) = argmin_β Σ_x ‖Y(x) − β f_j(x) d_j‖²  =  Σ_x f_j (d_j·Y) / (‖d_j‖² Σ_x f_j²)

The same target taken from the other model, over it from the model that the direction belongs to, is ν = β_other / β_own:
0 if only that model has the latent, 1 if both do. Targets that leave the latent's own contribution in place,
Y = E + f_j d'_j with the error E, follow from E alone: Σ f_j (d_j·Y) = Σ f_j (d_j·E) + (d_j·d'_j) Σ f_j².

All latents, targets and directions in one pass over the tokens: codeᵀ·targets (a product over active entries), and its
rows' products with the directions, some latents at a time in room that is used again: what a batch costs beyond its
active entries is reading each direction once, not fetching new memory of the dictionary's size. Sums are kept in
float64 for each of a few blocks of documents, so that ν has a jackknife interval: documents, not tokens, are the
sampling unit.

Reference: https://arxiv.org/abs/2504.02922, section 3. Jackknife: Efron and Tibshirani 1993, ch. 11.

Suffixes: B blocks of documents, N tokens, F latents, T targets, K directions, D width.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from diffing_core.document_blocks import N_BLOCKS
from diffing_core.lazy import torch
from diffing_core.settings import short_hash
from diffing_core.sparse_code import SparseCode
from diffing_core.stats import LEVEL
from diffing_core.sums import float64_device

VALUES_TOGETHER = 2**23  # of products held at a time


class Ratio(NamedTuple):
    """ν of every latent with its interval, float64 [F]; NaN where there is none."""

    value_F: np.ndarray
    low_F: np.ndarray
    high_F: np.ndarray

    def where(self, holds_F: np.ndarray) -> "Ratio":
        """NaN where the condition does not hold."""
        return Ratio(*(np.where(holds_F, each_F, np.nan) for each_F in self))


class LatentScaling:
    """Sums from which every β follows; fed batch by batch, each of one block of documents."""

    def __init__(self, directions: Mapping[str, Any], targets: tuple[str, ...], n_blocks: int = N_BLOCKS) -> None:
        """`directions`: float32 [F, D] by name; `targets`: names of what will be given to `add`."""
        self._direction_FKD = torch.stack([direction_FD.float() for direction_FD in directions.values()], dim=1)
        self._directions = {name: self._direction_FKD[:, place] for place, name in enumerate(directions)}
        self._targets = targets
        n_latents, n_directions, width = self._direction_FKD.shape
        n_together = min(n_latents, max(1, VALUES_TOGETHER // (len(targets) * width)))
        self._room_TFD = self._direction_FKD.new_zeros(len(targets), n_together, width)
        sums = {"dtype": torch.float64, "device": float64_device(self._direction_FKD.device)}
        self._dots_BFTK = torch.zeros(n_blocks, n_latents, len(targets), n_directions, **sums)
        self._squares_BF, self._active_BF = (torch.zeros(n_blocks, n_latents, **sums) for _ in range(2))
        self._tokens_B = np.zeros(n_blocks, np.int64)

    def add(self, code: SparseCode, targets: Mapping[str, Any], block: int) -> None:
        """Adds N tokens of one block of documents; targets are float32 [N, D]."""
        for first in range(0, len(self._direction_FKD), self._room_TFD.shape[1]):
            some_FKD = self._direction_FKD[first : first + self._room_TFD.shape[1]]
            here, room_TFD = slice(first, first + len(some_FKD)), self._room_TFD[:, : len(some_FKD)]
            code.transposed_into(room_TFD, [targets[target] for target in self._targets], here)
            dots_FTK = torch.bmm(room_TFD.transpose(0, 1), some_FKD.transpose(1, 2))
            self._dots_BFTK[block, here] += dots_FTK.to(self._dots_BFTK)
        self._squares_BF[block] += code.sums(code.value_A.double().square()).to(self._squares_BF)
        self._active_BF[block] += code.sums().to(self._active_BF)
        self._tokens_B[block] += len(code)

    @property
    def n_active_F(self) -> np.ndarray:
        """Tokens on which each latent was active."""
        return self._active_BF.sum(0).cpu().numpy().astype(np.int64)

    @property
    def squares_F(self) -> np.ndarray:
        """Σ f_j² of each latent."""
        return self._squares_BF.sum(0).cpu().numpy()

    def beta(self, target: str, direction: str, own_FD: Any | None = None) -> np.ndarray:
        """β of every latent, float64 [F]; NaN where it was never active or has no direction.

        Args:
            own_FD: what each latent contributes to the target beside what was given to `add`.
        """
        direction_FD = self._directions[direction].double()
        size_F = direction_FD.square().sum(1).cpu().numpy() * self._squares_BF.sum(0).cpu().numpy()
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(size_F > 0, self._numerator_BF(target, direction, own_FD).sum(0) / size_F, np.nan)

    def ratio(
        self, other: tuple[str, Any | None], own: tuple[str, Any | None], direction: str
    ) -> Ratio:
        """ν = β(other) / β(own) along a direction, each side a target and what latents add to it, as in `beta`."""
        return jackknifed_ratio(*(self._numerator_BF(target, direction, add) for target, add in (other, own)), self._tokens_B > 0)

    def _numerator_BF(self, target: str, direction: str, own_FD: Any | None) -> np.ndarray:
        dots_BF = self._dots_BFTK[:, :, self._targets.index(target), list(self._directions).index(direction)]
        if own_FD is not None:
            overlap_F = (self._directions[direction].double() * own_FD.double()).sum(1)
            dots_BF = dots_BF + overlap_F.to(dots_BF) * self._squares_BF
        return dots_BF.cpu().numpy()


def jackknifed_ratio(above_BF: np.ndarray, below_BF: np.ndarray, read_B: np.ndarray) -> Ratio:
    """Σ above / Σ below with the interval of leaving one block out at a time, among the blocks that hold any token.

    Only blocks in which the latent was active tell anything of it, so they alone count; with fewer than two there is no interval.
    """
    from scipy.stats import t

    with np.errstate(divide="ignore", invalid="ignore"):
        whole_F = above_BF.sum(0) / below_BF.sum(0)
        without_BF = (above_BF.sum(0) - above_BF) / (below_BF.sum(0) - below_BF)
        told_BF = read_B[:, None] & ((above_BF != 0) | (below_BF != 0))
        n_F = told_BF.sum(0)
        without_BF = np.where(told_BF, without_BF, 0.0)
        mean_F = without_BF.sum(0) / n_F
        spread_F = np.where(told_BF, (without_BF - mean_F) ** 2, 0.0).sum(0)
        half_F = t.ppf((1 + LEVEL) / 2, np.maximum(n_F - 1, 1)) * np.sqrt((n_F - 1) / n_F * spread_F)
    half_F = np.where(n_F > 1, half_F, np.nan)
    whole_F = np.where(np.isfinite(whole_F), whole_F, np.nan)
    return Ratio(whole_F, whole_F - half_F, whole_F + half_F)


def random_directions(like_FD: Any, seed: int) -> Any:
    """Random vectors with the norms of these: a control, along which every β must be about zero."""
    draw = torch.Generator().manual_seed(int(short_hash(["control", seed], 8), 16))  # not those a dictionary may start with
    random_FD = torch.randn(like_FD.shape, generator=draw).to(like_FD)
    return random_FD * (like_FD.norm(dim=1, keepdim=True) / random_FD.norm(dim=1, keepdim=True))


def permuted_directions(like_FD: Any) -> Any:
    """Every latent with its neighbour's direction: a control for what all latents have in common."""
    return like_FD.roll(1, 0)
