"""One pass over all stored tokens with a finished crosscoder: how well it fits, what each latent does, Latent Scaling.

    FVU_m = Σ ‖h_m − ĥ_m‖² / Σ ‖h_m − mean‖²         and of δ = h_tuned − h_base, with δ̂ = ĥ_tuned − ĥ_base

apart for tokens that it was fitted on and for held-out ones. Rows are gathered by block of documents, whole sequences
together, so that Latent Scaling gets its blocks and sequences can be counted.

Suffixes: M models, N tokens, D width, F latents.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from diffing_core.activation_pairs import PairedActivations, PairedRows, Selection, joined
from diffing_core.document_blocks import by_block
from diffing_core.fit_reading import FitReading
from diffing_core.latent_scaling import LatentScaling, permuted_directions, random_directions
from diffing_core.lazy import torch
from diffing_core.methods.crosscoder.model import SIDES, Crosscoder
from diffing_core.sparse_code import SparseCode

CONTROL_SEED = 0
ERRORS = tuple(f"error {side}" for side in SIDES)
RECONSTRUCTIONS = tuple(f"reconstruction {side}" for side in SIDES)
STREAMS = (*SIDES, "difference")
PARTS = ("fit", "held_out")
NO_VARIANCE = 1e-6  # share of the squares; what float32 cannot tell from none


class Explained:
    """Squared errors against variance for base, tuned and their difference, over each of some parts of the tokens.

    Rows are summed in float32 about a mean that is nearly theirs, and added up in float64.
    """

    def __init__(self, shift_MD: tuple[Any, Any], n_parts: int) -> None:
        """`shift_MD`: means of base and tuned, at least about."""
        base_D, tuned_D = shift_MD
        self._shift = dict(zip(STREAMS, (base_D, tuned_D, tuned_D - base_D), strict=True))
        self._sum_PD = {name: np.zeros((n_parts, len(base_D))) for name in STREAMS}
        self._square_P, self._error_P = ({name: np.zeros(n_parts) for name in STREAMS} for _ in range(2))
        self.n_tokens_P, self.n_active_P = (np.zeros(n_parts, np.int64) for _ in range(2))

    def add(
        self, activation_MND: tuple[Any, Any], error_MND: tuple[Any, Any], n_active_N: np.ndarray, part_N: np.ndarray
    ) -> None:
        """Adds N tokens, each of one part."""
        n_parts = len(self.n_tokens_P)
        self.n_tokens_P += np.bincount(part_N, minlength=n_parts)
        self.n_active_P += np.bincount(part_N, n_active_N, n_parts).astype(np.int64)
        of_part_PN = torch.from_numpy((part_N == np.arange(n_parts)[:, None]).astype(np.float32)).to(activation_MND[0].device)
        values = (*activation_MND, activation_MND[1] - activation_MND[0])
        errors = (*error_MND, error_MND[1] - error_MND[0])
        for name, value_ND, error_ND in zip(STREAMS, values, errors, strict=True):
            centred_ND = value_ND - self._shift[name].to(value_ND)
            self._sum_PD[name] += (of_part_PN @ centred_ND).cpu().numpy()
            for total_P, each_ND in ((self._square_P, centred_ND), (self._error_P, error_ND)):
                square_N = torch.linalg.vecdot(each_ND, each_ND).cpu().numpy()
                total_P[name] += np.bincount(part_N, square_N, n_parts)

    def fvu(self, stream: str, part: int) -> float | None:
        """Fraction of variance unexplained; None where there is no variance."""
        n_tokens, squares = self.n_tokens_P[part], self._square_P[stream][part]
        if not n_tokens:
            return None
        variance = squares - float(np.square(self._sum_PD[stream][part]).sum()) / n_tokens
        return float(self._error_P[stream][part]) / variance if variance > NO_VARIANCE * squares else None


@dataclass
class Reading:
    """What one pass found. `n_sequences` counts those with any token read."""

    scaling: LatentScaling
    explained: Explained
    maximum_F: Any
    n_active_F: Any
    sequences_F: Any
    held_out_active_F: Any
    fit_active_F: Any
    n_sequences: int = 0
    n_tokens: int = field(default=0)

    @classmethod
    def of(
        cls, crosscoder: Crosscoder, stored: PairedActivations, held_out: Selection, place: FitReading,
        shift_MD: tuple[Any, Any], what: str = "crosscoder: reading",
    ) -> "Reading":  # fmt: skip
        """Reads the rows of `stored`; those that `held_out` keeps count as held out. Progress is shown as `what`."""
        zero_F = torch.zeros(crosscoder.n_latents, device=crosscoder.bias_F.device)
        found = cls(
            LatentScaling(scaled_directions(crosscoder), ERRORS + RECONSTRUCTIONS),
            Explained(shift_MD, len(PARTS)),
            zero_F.clone(),
            *(zero_F.double() for _ in range(4)),
        )
        decoders = [
            (direction_FD, bias_D.detach() / scale)
            for direction_FD, bias_D, scale in zip(
                crosscoder.directions(), crosscoder.decoder_bias_MD, crosscoder.scale_M, strict=True
            )
        ]
        for block, rows in by_block(whole_sequences(stored.watched(what))):
            found._add(crosscoder, decoders, rows, (held_out.keeps(rows), place.sequence_N(rows)), block)
        return found

    def _add(
        self, crosscoder: Crosscoder, decoders: Sequence[tuple[Any, Any]], rows: PairedRows, facts: tuple[np.ndarray, np.ndarray],
        block: int,
    ) -> None:  # fmt: skip
        """Rows of one block; `decoders` and their biases in units of the activations, `facts`: held out or not, sequence."""
        held_out_N, sequence_N = facts
        activation_MND = tuple(each.to(crosscoder.bias_F.device).float() for each in (rows.base_ND, rows.tuned_ND))
        code = crosscoder.sparse(crosscoder.scaled(activation_MND))
        rebuilt_MND = [code.times(direction_FD, bias_D) for direction_FD, bias_D in decoders]
        error_MND = [value - rebuilt for value, rebuilt in zip(activation_MND, rebuilt_MND, strict=True)]
        targets = dict(zip(ERRORS + RECONSTRUCTIONS, (*error_MND, *rebuilt_MND), strict=True))
        self.scaling.add(code, targets, block)
        self._count(code, held_out_N, sequence_N)
        self.explained.add(activation_MND, error_MND, code.start_N1.diff().cpu().numpy(), held_out_N.astype(np.int64))

    def _count(self, code: SparseCode, held_out_N: np.ndarray, sequence_N: np.ndarray) -> None:
        self.maximum_F = torch.maximum(self.maximum_F, code.maxima())
        active_F = code.sums()
        self.n_active_F += active_F
        held_out_A = torch.from_numpy(held_out_N).to(code.row_A.device)[code.row_A]
        held_out_F = code.sums(held_out_A)
        self.held_out_active_F += held_out_F
        self.fit_active_F += active_F - held_out_F
        unique, number_N = np.unique(sequence_N, return_inverse=True)
        seen_SF = torch.zeros(len(unique), code.n_latents, dtype=torch.bool, device=code.row_A.device)
        seen_SF[torch.from_numpy(number_N).to(code.row_A.device)[code.row_A], code.latent_A] = True
        self.sequences_F += seen_SF.sum(0)
        self.n_sequences += len(unique)
        self.n_tokens += len(code)


def scaled_directions(crosscoder: Crosscoder) -> dict[str, Any]:
    """Along what Latent Scaling measures: both decoders, and two controls of the tuned one, [F, D] each."""
    base_FD, tuned_FD = crosscoder.directions()
    controls = {"random": random_directions(tuned_FD, CONTROL_SEED), "permuted": permuted_directions(tuned_FD)}
    return dict(zip(SIDES, (base_FD, tuned_FD), strict=True)) | controls


def whole_sequences(blocks: Iterable[PairedRows]) -> Iterator[PairedRows]:
    """The same rows, cut between sequences only: the last one of a block waits for the next block."""
    rest: PairedRows | None = None
    for rows in blocks:
        together = rows if rest is None else joined([rest, rows])
        last_N = (together.sequence_N == together.sequence_N[-1]) & (together.corpus_N == together.corpus_N[-1])
        n_done = len(last_N) - int(last_N.sum())
        if n_done:
            yield together.take(slice(0, n_done))
        rest = together.take(slice(n_done, None))
    if rest is not None:
        yield rest
