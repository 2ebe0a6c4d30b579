"""How held-out tokens of both models use the atoms of one layer.

    energy_j = mean (C_j ‖h‖)² / mean ‖h‖²        C: codes of vectors of length 1; usage × energy where used
    FVU      = Σ ‖h − ĥ‖² / Σ ‖h − mean h‖²

Significance is by texts: an atom's mean over the tokens of a text is one observation, and a sign test counts the texts in
which the tuned model has more of it against those in which it has less.

Suffixes: N tokens, D width, I atoms, A some of them, S texts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from diffing_core.itda_dictionary import Staged, unit
from diffing_core.lazy import torch
from diffing_core.methods.itda.material import Material
from diffing_core.pursuit import Code, Pursuit
from diffing_core.stats import benjamini_hochberg, sign_tests


@dataclass(frozen=True)
class Significance:
    """Of each atom: p- and q-values over texts, [I]."""

    p_I: np.ndarray
    q_I: np.ndarray


class Usage:
    """Codes of the held-out tokens: in base atoms, and in base and added atoms. They are kept sparse and made dense in parts."""

    def __init__(self, held_out: Material, found: Staged, encoder: Pursuit) -> None:
        self.held_out, self.found, self._encoder = held_out, found, encoder
        self._document_N = torch.from_numpy(np.unique(held_out.sequence_N, return_inverse=True)[1])

    @cached_property
    def in_base_atoms(self) -> dict[str, Code]:
        """Side -> code."""
        return self._coded(self._encoder, self.found.base.atom_ID)

    @cached_property
    def in_all_atoms(self) -> dict[str, Code]:
        """The same with the added atoms; codes of base atoms alone where none was added."""
        if len(self.found.whole) == self.found.n_base:
            return self.in_base_atoms
        return self._coded(self._encoder, self.found.whole.atom_ID)

    def published_delta(self) -> tuple[np.ndarray, Significance]:
        """Mean C_j(h_tuned) − mean C_j(h_base) in the base's dictionary, [I]; C by plain matching pursuit, as published."""
        codes = self._coded(replace(self._encoder, orthogonal=False), self.found.base.atom_ID)
        base_I, tuned_I = (
            sum(part_NI.double().sum(0) for _, part_NI in codes[side].parts(self.found.n_base)) for side in ("base", "tuned")
        )
        delta_I = tuned_I / len(self.held_out) - base_I / len(self.held_out)
        return delta_I.cpu().numpy(), self._significance(codes, self.found.n_base, slice(None), lambda part_NA: part_NA)

    def sizes(self, side: str, atoms: Sequence[int]) -> np.ndarray:
        """Absolute coefficients of some atoms in one model's vectors, [N, A]."""
        return self.in_all_atoms[side].columns(len(self.found.whole), atoms).abs().cpu().numpy()

    def energy(self, side: str, atoms: Sequence[int]) -> np.ndarray:
        """Energy of some atoms in one model's vectors, [A]."""
        vector_ND = self._vectors(side)
        norm_N1 = vector_ND.norm(dim=1, keepdim=True)
        summed_A = sum(
            (part_NI[:, atoms] * norm_N1[here]).double().square().sum(0)
            for here, part_NI in self.in_all_atoms[side].parts(len(self.found.whole))
        )
        return (summed_A / len(vector_ND) / vector_ND.double().square().sum(1).mean()).cpu().numpy()

    def share_used(self, side: str, atoms: Sequence[int]) -> np.ndarray:
        """Share of one model's vectors whose code has each of some atoms, [A]."""
        parts = self.in_all_atoms[side].parts(len(self.found.whole))
        return (sum((part_NI[:, atoms] != 0).double().sum(0) for _, part_NI in parts) / len(self.held_out)).cpu().numpy()

    def significance(self, atoms: Sequence[int]) -> Significance:
        """That these atoms have as often more as less energy in the tuned model."""
        return self._significance(self.in_all_atoms, len(self.found.whole), atoms, lambda part_NA: part_NA.square())

    def fvu(self, side: str, code: Code, n_atoms: int) -> float:
        """Unexplained variance of one model's vectors coded in the first atoms; 0 if they do not vary."""
        vector_ND = self._vectors(side)
        left = self._left(vector_ND, vector_ND, code, self.found.whole.atom_ID[:n_atoms])
        total = (vector_ND.double() - vector_ND.double().mean(0)).square().sum()
        return float(left / total) if total > 0 else 0.0

    def difference_fvu(self, turned_ID: Any) -> float | None:
        """Unexplained variance of h_tuned − h_base when each atom of the tuned code brings what tuning did to its token [I, D]."""
        base_ND, tuned_ND = self._vectors("base"), self._vectors("tuned")
        difference_ND = tuned_ND - base_ND
        left = self._left(difference_ND, tuned_ND, self.in_all_atoms["tuned"], turned_ID)
        total = float((difference_ND.double() - difference_ND.double().mean(0)).square().sum())
        return float(left) / total if total > 0 else None

    def _vectors(self, side: str) -> Any:
        return getattr(self.held_out, f"{side}_ND")

    def _coded(self, encoder: Pursuit, atom_ID: Any) -> dict[str, Code]:
        return {side: encoder.encode(unit(self._vectors(side)), atom_ID) for side in ("base", "tuned")}

    def _left(self, wanted_ND: Any, vector_ND: Any, code: Code, part_ID: Any) -> Any:
        """Σ ‖wanted − ‖h‖ Σ C_j part_j‖², float64."""
        norm_N1 = vector_ND.norm(dim=1, keepdim=True)
        return sum(
            (wanted_ND[here] - (part_NI @ part_ID) * norm_N1[here]).double().square().sum() for here, part_NI in code.parts(len(part_ID))
        )

    def _significance(
        self, codes: Mapping[str, Code], n_atoms: int, atoms: Sequence[int] | slice, of: Callable[[Any], Any]
    ) -> Significance:
        """Differences of what is made `of` these atoms' coefficients, summed over texts, which are the observations."""
        place_N = self._document_N.to(self._vectors("base").device)
        summed_SA = torch.zeros(int(place_N.max()) + 1, len(np.arange(n_atoms)[atoms]), dtype=torch.float64, device=place_N.device)
        for (here, base_NI), (_, tuned_NI) in zip(*(codes[side].parts(n_atoms) for side in ("base", "tuned")), strict=True):
            summed_SA.index_add_(0, place_N[here], (of(tuned_NI[:, atoms]) - of(base_NI[:, atoms])).double())
        p_A = sign_tests(*((sign * summed_SA > 0).sum(0).cpu().numpy() for sign in (1, -1)))
        return Significance(p_A, np.asarray(benjamini_hochberg(p_A)))


def mean_l0(code: Code, n_atoms: int) -> float:
    """Mean number of atoms of a code."""
    return float(sum((part_NI != 0).sum() for _, part_NI in code.parts(n_atoms)).double() / len(code.atom_NK))
