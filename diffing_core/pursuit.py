"""Sparse codes of vectors over a fixed dictionary: matching pursuit and orthogonal matching pursuit, in batches.

    at every step   i = argmax |⟨r, a_i⟩|   (argmax ⟨r, a_i⟩ if the choice is non-negative)
    matching        r ← r − ⟨r, a_i⟩ a_i                      (Mallat and Zhang 1993)
    orthogonal      r ← x − its projection on the chosen atoms (Pati, Rezaiifar and Krishnaprasad 1993)

Orthogonal pursuit keeps an orthonormal basis of the chosen atoms (Gram–Schmidt, twice), so no system is solved before
the end. A non-negative choice is one of atoms: re-solving the coefficients may still make one negative. Matching pursuit
may choose an atom again; its coefficients add up.

Suffixes: N rows, D width, I atoms, K steps.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from diffing_core.lazy import torch

VALUES_TOGETHER = 2**22  # inner products held at a time
NEGLIGIBLE = 1e-6  # a row of which no more than this share is left has no further step
SPANNED = 1e-4  # length that an atom must have beside those chosen before it


@dataclass(frozen=True)
class Code:
    """How atoms add up to N rows: the atom of each step, int64 [N, K], −1 where there was none, and its coefficient."""

    atom_NK: Any
    coefficient_NK: Any

    def dense(self, n_atoms: int) -> Any:
        """Coefficients [N, I]; those of an atom that was chosen more than once are added up."""
        dense_NI = self.coefficient_NK.new_zeros(len(self.atom_NK), n_atoms)
        return dense_NI.scatter_add_(1, self.atom_NK.clamp(min=0), self.coefficient_NK)

    def parts(self, n_atoms: int) -> Iterator[tuple[slice, Any]]:
        """The same a few rows at a time: which they are, and their coefficients [n, I]."""
        n_rows = max(1, VALUES_TOGETHER // max(n_atoms, 1))
        for start in range(0, len(self.atom_NK), n_rows):
            here = slice(start, start + n_rows)
            yield here, Code(self.atom_NK[here], self.coefficient_NK[here]).dense(n_atoms)

    def columns(self, n_atoms: int, atoms: Sequence[int]) -> Any:
        """Coefficients of some atoms, [N, A]."""
        return torch.cat([part_NI[:, atoms] for _, part_NI in self.parts(n_atoms)])

    def reconstruction(self, atom_ID: Any) -> Any:
        """What the atoms add up to, [N, D]."""
        total_ND = self.coefficient_NK.new_zeros(len(self.atom_NK), atom_ID.shape[1])
        for atom_N, coefficient_N in zip(self.atom_NK.T, self.coefficient_NK.T, strict=True) if len(atom_ID) else ():
            total_ND += coefficient_N[:, None] * atom_ID[atom_N.clamp(min=0)]
        return total_ND


@dataclass(frozen=True)
class Pursuit:
    """How rows are encoded: at most `steps` choices each.

    Attributes:
        orthogonal: orthogonal matching pursuit; else plain.
        non_negative: only atoms with a positive inner product are chosen.
    """

    steps: int
    orthogonal: bool = True
    non_negative: bool = False

    def encode(self, row_ND: Any, atom_ID: Any) -> Code:
        """Codes of N float32 rows over I unit atoms, on the device where both lie."""
        parts = [self._encoded(part_ND, atom_ID) for part_ND in self._chunks(row_ND, atom_ID)]
        return Code(torch.cat([part.atom_NK for part in parts]), torch.cat([part.coefficient_NK for part in parts]))

    def expresses(self, row_ND: Any, atom_ID: Any, min_cosine: float) -> Any:
        """Which rows come, at some step of theirs, to that cosine with their reconstruction, bool [N]."""
        parts = [self._expressed(part_ND, atom_ID, min_cosine) for part_ND in self._chunks(row_ND, atom_ID)]
        return torch.cat(parts)

    def _chunks(self, row_ND: Any, atom_ID: Any) -> Iterator[Any]:
        yield from row_ND.split(max(1, VALUES_TOGETHER // max(len(atom_ID), self.steps * row_ND.shape[1])))

    def _state(self, row_ND: Any) -> "_Plain":
        return (_Orthogonal if self.orthogonal else _Plain)(row_ND, self.steps)

    def _encoded(self, row_ND: Any, atom_ID: Any) -> Code:
        state, floor_N = self._state(row_ND), NEGLIGIBLE * row_ND.norm(dim=1)
        for step in range(self.steps if len(atom_ID) else 0):
            if not self._step(state, step, atom_ID, floor_N):
                break
        return Code(state.atom_NK, state.coefficients())

    def _expressed(self, row_ND: Any, atom_ID: Any, min_cosine: float) -> Any:
        """Rows that are there are not looked at any longer: most are after a step or two."""
        reached_N = torch.zeros(len(row_ND), dtype=torch.bool, device=row_ND.device)
        state, floor_N, open_N = self._state(row_ND), NEGLIGIBLE * row_ND.norm(dim=1), torch.arange(len(row_ND), device=row_ND.device)
        for step in range(self.steps if len(atom_ID) else 0):
            if not self._step(state, step, atom_ID, floor_N):
                break
            there_N = torch.nn.functional.cosine_similarity(row_ND, row_ND - state.residual_ND, dim=1) >= min_cosine
            reached_N[open_N[there_N]] = True
            state.only(~there_N)
            row_ND, floor_N, open_N = row_ND[~there_N], floor_N[~there_N], open_N[~there_N]
        return reached_N

    def _step(self, state: "_Plain", step: int, atom_ID: Any, floor_N: Any) -> bool:
        """One choice of every row; whether any row had one."""
        product_NI = state.residual_ND @ atom_ID.T
        if self.orthogonal and step:
            product_NI.scatter_(1, state.atom_NK[:, :step].clamp(min=0), 0.0)
        largest_N, chosen_N = (product_NI if self.non_negative else product_NI.abs_()).max(1)
        moves_N = largest_N > floor_N
        state.take(step, torch.where(moves_N, chosen_N, -1), atom_ID[chosen_N])
        return bool(moves_N.any())


class _Plain:
    """Residual and choices of matching pursuit."""

    def __init__(self, row_ND: Any, steps: int) -> None:
        self.residual_ND = row_ND.clone()
        self.atom_NK = torch.full((len(row_ND), steps), -1, dtype=torch.int64, device=row_ND.device)
        self._part_NK = row_ND.new_zeros(len(row_ND), steps)

    def take(self, step: int, atom_N: Any, chosen_ND: Any) -> None:
        """One choice of every row; −1 for rows that have ended."""
        part_N = (self.residual_ND * chosen_ND).sum(1) * (atom_N >= 0)
        self.atom_NK[:, step], self._part_NK[:, step] = atom_N, part_N
        self.residual_ND -= part_N[:, None] * chosen_ND

    def only(self, kept_N: Any) -> None:
        """Leaves out the other rows."""
        for name, value in vars(self).items():
            setattr(self, name, value[kept_N])

    def coefficients(self) -> Any:
        """[N, K]."""
        return self._part_NK


class _Orthogonal(_Plain):
    """The same of orthogonal matching pursuit: the chosen atoms are R Q, Q orthonormal [K, D] and R lower triangular."""

    def __init__(self, row_ND: Any, steps: int) -> None:
        super().__init__(row_ND, steps)
        self._basis_NKD = row_ND.new_zeros(len(row_ND), steps, row_ND.shape[1])
        self._factor_NKK = torch.eye(steps, dtype=row_ND.dtype, device=row_ND.device).repeat(len(row_ND), 1, 1)

    def take(self, step: int, atom_N: Any, chosen_ND: Any) -> None:
        """One choice of every row; an atom that the chosen ones already span counts for none."""
        known_NKD = self._basis_NKD[:, :step]
        rest_ND, along_NK = chosen_ND.clone(), chosen_ND.new_zeros(len(chosen_ND), step)
        for _ in range(2 if step else 0):
            inner_NK = torch.bmm(known_NKD, rest_ND[:, :, None])[:, :, 0]
            rest_ND -= torch.bmm(inner_NK[:, None], known_NKD)[:, 0]
            along_NK += inner_NK
        length_N = rest_ND.norm(dim=1)
        moves_N = (atom_N >= 0) & (length_N > SPANNED)
        unit_ND = rest_ND * (moves_N / length_N.clamp(min=SPANNED))[:, None]
        super().take(step, torch.where(moves_N, atom_N, -1), unit_ND)
        self._basis_NKD[:, step] = unit_ND
        self._factor_NKK[:, step, :step] = along_NK * moves_N[:, None]
        self._factor_NKK[:, step, step] = torch.where(moves_N, length_N, 1.0)

    def coefficients(self) -> Any:
        """[N, K]: Rᵀ c = the row's parts along the basis."""
        upper_NKK = self._factor_NKK.transpose(1, 2)
        return torch.linalg.solve_triangular(upper_NKK, self._part_NK[:, :, None], upper=True)[:, :, 0]
