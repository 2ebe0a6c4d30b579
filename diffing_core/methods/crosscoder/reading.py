"""One pass over all stored tokens with a finished crosscoder: how well it fits, what each latent does, Latent Scaling.

    FVU_m = Σ ‖h_m − ĥ_m‖² / Σ ‖h_m − mean‖²         and of δ = h_tuned − h_base, with δ̂ = ĥ_tuned − ĥ_base

apart for tokens that it was fitted on and for held-out ones. Rows are gathered by block of documents, whole sequences
together, so that Latent Scaling gets its blocks and sequences can be counted.

Suffixes: M models, N tokens, D width, F latents.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from diffing_core.activation_pairs import PairedActivations, PairedRows, Selection, joined
from diffing_core.fit_reading import FitReading
from diffing_core.latent_scaling import N_BLOCKS, LatentScaling, block_of, permuted_directions, random_directions
from diffing_core.lazy import torch
from diffing_core.methods.crosscoder.data import Outliers
from diffing_core.methods.crosscoder.model import SIDES, Crosscoder
from diffing_core.sparse_code import SparseCode

ROWS_TOGETHER = 2048
CONTROL_SEED = 0
ERRORS = tuple(f"error {side}" for side in SIDES)
RECONSTRUCTIONS = tuple(f"reconstruction {side}" for side in SIDES)
STREAMS = (*SIDES, "difference")


class Fit:
    """Squared errors against variance for base, tuned and their difference, over one part of the tokens."""

    def __init__(self, shift_MD: tuple[Any, Any]) -> None:
        base_D, tuned_D = (mean_D.double() for mean_D in shift_MD)
        self._shift = dict(zip(STREAMS, (base_D, tuned_D, tuned_D - base_D), strict=True))
        self._sums = {name: torch.zeros_like(shift_D) for name, shift_D in self._shift.items()}
        self._squares, self._errors = dict.fromkeys(STREAMS, 0.0), dict.fromkeys(STREAMS, 0.0)
        self.n_tokens = 0
        self.n_active = 0

    def add(self, activation_MND: tuple[Any, Any], error_MND: tuple[Any, Any], n_active: int) -> None:
        """Adds N tokens."""
        self.n_tokens += len(error_MND[0])
        self.n_active += n_active
        values = (*activation_MND, activation_MND[1] - activation_MND[0])
        errors = (*error_MND, error_MND[1] - error_MND[0])
        for name, value_ND, error_ND in zip(STREAMS, values, errors, strict=True):
            centred_ND = value_ND.cpu().double() - self._shift[name]
            self._sums[name] += centred_ND.sum(0)
            self._squares[name] += float(centred_ND.square().sum())
            self._errors[name] += float(error_ND.double().square().sum())

    def fvu(self, stream: str) -> float | None:
        """Fraction of variance unexplained; None where there is no variance."""
        if not self.n_tokens:
            return None
        mean = self._sums[stream] / self.n_tokens
        variance = self._squares[stream] - self.n_tokens * float(mean.square().sum())
        return self._errors[stream] / variance if variance > 1e-9 * self._squares[stream] else None


@dataclass
class Reading:
    """What one pass found. `n_sequences` counts those with any token read."""

    scaling: LatentScaling
    fits: dict[str, Fit]
    maximum_F: Any
    n_active_F: Any
    sequences_F: Any
    held_out_active_F: Any
    fit_active_F: Any
    n_sequences: int = 0
    n_tokens: int = field(default=0)

    @classmethod
    def of(
        cls, crosscoder: Crosscoder, stored: PairedActivations, held_out: Selection, outliers: Outliers, place: FitReading,
        shift_MD: tuple[Any, Any],
    ) -> "Reading":  # fmt: skip
        """Reads the rows of `stored`; those that `held_out` keeps count as held out."""
        directions = dict(zip(SIDES, crosscoder.directions(), strict=True))
        directions |= {"random": random_directions(directions["tuned"], CONTROL_SEED), "permuted": permuted_directions(directions["tuned"])}
        zero_F = torch.zeros(crosscoder.n_latents, device=crosscoder.bias_F.device)
        found = cls(
            LatentScaling(directions, ERRORS + RECONSTRUCTIONS),
            {part: Fit(shift_MD) for part in ("fit", "held_out")},
            zero_F.clone(),
            *(zero_F.double() for _ in range(4)),
        )
        kept = (outliers.kept(rows) for rows in stored.blocks())
        for block, rows in by_block(whole_sequences(rows for rows in kept if len(rows)), place):
            found._add(crosscoder, rows, held_out.keeps(rows), place.sequence_N(rows), block)
        return found

    def _add(
        self, crosscoder: Crosscoder, rows: PairedRows, held_out_N: np.ndarray, sequence_N: np.ndarray, block: int
    ) -> None:
        activation_MND = tuple(each.to(crosscoder.bias_F.device).float() for each in (rows.base_ND, rows.tuned_ND))
        code = crosscoder.sparse(crosscoder.scaled(activation_MND))
        rebuilt_MND = [
            (code.times(decoder_FD.detach()) + bias_D.detach()) / scale
            for decoder_FD, bias_D, scale in zip(
                crosscoder.decoder_MFD, crosscoder.decoder_bias_MD, crosscoder.scale_M, strict=True
            )
        ]
        error_MND = [value - rebuilt for value, rebuilt in zip(activation_MND, rebuilt_MND, strict=True)]
        targets = dict(zip(ERRORS + RECONSTRUCTIONS, (*error_MND, *rebuilt_MND), strict=True))
        self.scaling.add(code, targets, block)
        self._count(code, held_out_N, sequence_N)
        n_active_N = code.start_N1.diff().cpu().numpy()
        for part, of_N in (("fit", ~held_out_N), ("held_out", held_out_N)):
            here = torch.from_numpy(np.flatnonzero(of_N)).to(activation_MND[0].device)
            if len(here):
                cut = [tuple(each[here] for each in pair) for pair in (activation_MND, error_MND)]
                self.fits[part].add(*cut, int(n_active_N[of_N].sum()))

    def _count(self, code: SparseCode, held_out_N: np.ndarray, sequence_N: np.ndarray) -> None:
        self.maximum_F = torch.maximum(self.maximum_F, code.maxima())
        self.n_active_F += code.sums()
        held_out_A = torch.from_numpy(held_out_N).to(code.row_A.device)[code.row_A]
        held_out_F = code.sums(held_out_A)
        self.held_out_active_F += held_out_F
        self.fit_active_F += code.sums() - held_out_F
        unique, number_N = np.unique(sequence_N, return_inverse=True)
        place_A = torch.from_numpy(number_N).to(code.row_A.device)[code.row_A] * code.n_latents + code.latent_A
        self.sequences_F += torch.bincount(place_A.unique() % code.n_latents, minlength=code.n_latents)
        self.n_sequences += len(unique)
        self.n_tokens += len(code)


def whole_sequences(blocks: Iterable[PairedRows]) -> Iterator[PairedRows]:
    """The same rows, cut between sequences only: the last one of a block waits for the next block."""
    rest: PairedRows | None = None
    for rows in blocks:
        together = rows if rest is None else joined([rest, rows])
        last_N = (together.sequence_N == together.sequence_N[-1]) & (together.corpus_N == together.corpus_N[-1])
        n_done = len(last_N) - int(last_N.sum())
        if n_done:
            yield together.take(np.arange(n_done))
        rest = together.take(np.arange(n_done, len(last_N)))
    if rest is not None:
        yield rest


def by_block(blocks: Iterable[PairedRows], place: FitReading) -> Iterator[tuple[int, PairedRows]]:
    """Rows of one block of documents at a time, some ROWS_TOGETHER of them, sequences whole."""
    waiting: dict[int, list[PairedRows]] = {block: [] for block in range(N_BLOCKS)}
    for rows in blocks:
        block_N = block_of(place.sequence_N(rows))
        for block in np.unique(block_N).tolist():
            waiting[block].append(rows.take(np.flatnonzero(block_N == block)))
            if sum(map(len, waiting[block])) >= ROWS_TOGETHER:
                yield block, joined(waiting[block])
                waiting[block] = []
    yield from ((block, joined(parts)) for block, parts in waiting.items() if parts)
