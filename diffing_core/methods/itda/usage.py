"""How held-out tokens of both models use the atoms of one layer.

    energy_j = mean (C_j ‖h‖)² / mean ‖h‖²        C: codes of vectors of length 1; usage × energy where used
    FVU      = Σ ‖h − ĥ‖² / Σ ‖h − mean h‖²

Significance is by texts: an atom's mean over the tokens of a text is one observation, and a sign test counts the texts in
which the tuned model has more of it against those in which it has less.

Suffixes: N tokens, D width, I atoms, S texts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from diffing_core.itda_dictionary import Staged, unit
from diffing_core.lazy import torch
from diffing_core.methods.itda.material import Material
from diffing_core.pursuit import Pursuit
from diffing_core.stats import benjamini_hochberg, sign_tests


@dataclass(frozen=True)
class Significance:
    """Of each atom: p- and q-values over texts, [I]."""

    p_I: np.ndarray
    q_I: np.ndarray


class Usage:
    """Codes of the held-out tokens: in base atoms, and in base and added atoms."""

    def __init__(self, held_out: Material, found: Staged, encoder: Pursuit) -> None:
        self.held_out, self.found, self._encoder = held_out, found, encoder
        self._document_N = torch.from_numpy(np.unique(held_out.sequence_N, return_inverse=True)[1])

    @cached_property
    def in_base_atoms(self) -> dict[str, Any]:
        """Side -> coefficients [N, I]."""
        return {side: self._coded(side, self.found.base.atom_ID) for side in ("base", "tuned")}

    @cached_property
    def in_all_atoms(self) -> dict[str, Any]:
        """The same with the added atoms; codes of base atoms alone where none was added."""
        if len(self.found.whole) == self.found.n_base:
            return self.in_base_atoms
        return {side: self._coded(side, self.found.whole.atom_ID) for side in ("base", "tuned")}

    def published_delta(self) -> tuple[np.ndarray, Significance]:
        """Mean C_j(h_tuned) − mean C_j(h_base) in the base's dictionary, [I]."""
        base_NI, tuned_NI = self.in_base_atoms["base"], self.in_base_atoms["tuned"]
        delta_I = tuned_NI.double().mean(0) - base_NI.double().mean(0)
        return delta_I.cpu().numpy(), self._significance(base_NI, tuned_NI)

    def energy(self, side: str, atoms: Sequence[int]) -> np.ndarray:
        """Energy of some atoms in one model's vectors, [I]."""
        vector_ND = self._vectors(side)
        part_NI = self.in_all_atoms[side][:, atoms] * vector_ND.norm(dim=1, keepdim=True)
        return (part_NI.double().square().mean(0) / vector_ND.double().square().sum(1).mean()).cpu().numpy()

    def share_used(self, side: str, atoms: Sequence[int]) -> np.ndarray:
        """Share of one model's vectors whose code has each of some atoms, [I]."""
        return (self.in_all_atoms[side][:, atoms] != 0).double().mean(0).cpu().numpy()

    def significance(self, atoms: Sequence[int]) -> Significance:
        """That these atoms have as often more as less energy in the tuned model."""
        return self._significance(*(self.in_all_atoms[side][:, atoms].square() for side in ("base", "tuned")))

    def fvu(self, side: str, code_NI: Any) -> float:
        """Unexplained variance of one model's vectors; 0 if they do not vary."""
        vector_ND, atom_ID = self._vectors(side), self.found.whole.atom_ID[: code_NI.shape[1]]
        left_ND = vector_ND - (code_NI @ atom_ID) * vector_ND.norm(dim=1, keepdim=True)
        total = (vector_ND.double() - vector_ND.double().mean(0)).square().sum()
        return float(left_ND.double().square().sum() / total) if total > 0 else 0.0

    def difference_fvu(self, turned_ID: Any) -> float | None:
        """Unexplained variance of h_tuned − h_base when each atom of the tuned code brings what tuning did to its token [I, D]."""
        base_ND, tuned_ND = self._vectors("base"), self._vectors("tuned")
        difference_ND = tuned_ND - base_ND
        left_ND = difference_ND - (self.in_all_atoms["tuned"] @ turned_ID) * tuned_ND.norm(dim=1, keepdim=True)
        total = float((difference_ND.double() - difference_ND.double().mean(0)).square().sum())
        return float(left_ND.double().square().sum()) / total if total > 0 else None

    def _vectors(self, side: str) -> Any:
        return getattr(self.held_out, f"{side}_ND")

    def _coded(self, side: str, atom_ID: Any) -> Any:
        return self._encoder.encode(unit(self._vectors(side)), atom_ID).dense(len(atom_ID))

    def _significance(self, base_NI: Any, tuned_NI: Any) -> Significance:
        """Mean differences of texts as observations."""
        place_N = self._document_N.to(base_NI.device)
        summed_SI = base_NI.new_zeros(int(place_N.max()) + 1, base_NI.shape[1], dtype=torch.float64)
        summed_SI.index_add_(0, place_N, (tuned_NI - base_NI).double())
        p_I = sign_tests(*((sign * summed_SI > 0).sum(0).cpu().numpy() for sign in (1, -1)))
        return Significance(p_I, np.asarray(benjamini_hochberg(p_I)))


def mean_l0(code_NI: Any) -> float:
    """Mean number of atoms of a code."""
    return float((code_NI != 0).sum(1).double().mean())
