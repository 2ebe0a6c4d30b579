"""Running statistics of folds: exact, in float64, of bounded size, and merged block by block."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffing_core.lazy import torch

MOMENTS_TOGETHER = 2**16  # values


class GroupedSums:
    """Count, sums and maxima of several quantities per integer group; groups appear as they are met."""

    def __init__(self, *names: str) -> None:
        self._sums = {name: np.zeros(0) for name in names}
        self._maxima = {name: np.zeros(0) for name in names}
        self._counts = np.zeros(0, np.int64)

    def add(self, group_N: np.ndarray, values: Mapping[str, np.ndarray]) -> None:
        """Adds N observations; group numbers are not negative."""
        size = max(len(self._counts), int(group_N.max(initial=-1)) + 1)
        self._counts = _grown(self._counts, size, 0) + np.bincount(group_N, minlength=size)
        for name in self._sums:
            seen = values[name].astype(np.float64)
            self._sums[name] = _grown(self._sums[name], size, 0.0) + np.bincount(group_N, seen, minlength=size)
            self._maxima[name] = _grown(self._maxima[name], size, -np.inf)
            np.maximum.at(self._maxima[name], group_N, seen)

    @property
    def groups(self) -> np.ndarray:
        """Groups with at least one observation, ascending."""
        return np.flatnonzero(self._counts)

    def count(self) -> np.ndarray:
        """Observations of each of `groups`."""
        return self._counts[self.groups]

    def mean(self, name: str) -> np.ndarray:
        """Mean of one quantity in each of `groups`."""
        return self._sums[name][self.groups] / self.count()

    def maximum(self, name: str) -> np.ndarray:
        """Largest value of one quantity in each of `groups`."""
        return self._maxima[name][self.groups]


class Grouping:
    """Rows of a block by integer group: the `groups` that occur, ascending, and their `counts`.

    `row_M` names the row of each of the M memberships, so that a row may be in several groups or in none;
    without it, row i is in group `group_M[i]`.
    """

    def __init__(self, group_M: np.ndarray, row_M: np.ndarray | None = None) -> None:
        order = np.argsort(group_M, kind="stable")
        self._rows = order if row_M is None else row_M[order]
        self.groups, self._starts, self.counts = np.unique(group_M[order], return_index=True, return_counts=True)
        self._members: tuple[Any, Any, Any] | None = None

    def sums(self, value_CN: np.ndarray) -> np.ndarray:
        """Sums of C quantities over each of the P groups, float64 [C, P]."""
        return np.add.reduceat(value_CN[:, self._rows], self._starts, axis=1, dtype=np.float64)

    def vector_sums(self, vector_ND: Any) -> Any:
        """Sums of torch vectors over each group, [P, D] where they lie: one product, in the same order on any device."""
        member_PM, row_M, _ = self._on(vector_ND.device)
        every_row = len(self._rows) == len(vector_ND) and bool((np.diff(self._rows) == 1).all())
        return member_PM.to(vector_ND.dtype) @ (vector_ND if every_row else vector_ND[row_M])

    def add_to(self, sums_GD: Any, vector_ND: Any) -> None:
        """Adds the sums over each group to its row of `sums_GD`."""
        if len(self.groups):
            *_, group_P = self._on(vector_ND.device)
            sums_GD.index_add_(0, group_P.to(sums_GD.device), self.vector_sums(vector_ND).to(sums_GD))

    def _on(self, device: Any) -> tuple[Any, Any, Any]:
        """Membership [P, M], rows [M] and groups [P] on the device; copied once, since each copy waits for it."""
        if self._members is None:
            member_PM = np.repeat(np.eye(len(self.groups), dtype=np.float32), self.counts, axis=1)
            self._members = tuple(torch.from_numpy(each).to(device) for each in (member_PM, self._rows, self.groups))
        return self._members


class VectorSums:
    """Sums of vectors by layer and group, float64 [L, G, D], where the vectors lie, so that adding does not fetch them.

    Group 0 is every row.
    """

    def __init__(self, n_layers: int, n_groups: int, width: int, device: Any) -> None:
        self._sums_LGD = torch.zeros(n_layers, n_groups, width, dtype=torch.float64, device=float64_device(device))

    def add(self, place: int, vector_ND: Any, grouping: Grouping) -> None:
        """Adds N rows at the layer of number `place`, once to group 0 and once to each of their groups."""
        sums_GD = self._sums_LGD[place]
        sums_GD[0] += vector_ND.sum(0).to(sums_GD.device)
        grouping.add_to(sums_GD, vector_ND)

    def numpy(self) -> np.ndarray:
        """The sums, [L, G, D]."""
        return self._sums_LGD.cpu().numpy()


def float64_device(device: Any) -> Any:
    """The device itself, or the processor where a device has no float64 (Apple's)."""
    return torch.device("cpu") if torch.device(device).type == "mps" else device


class SparseSums:
    """Count and float64 sums of C quantities per integer group; an update costs its block, however many groups there are."""

    def __init__(self, n_quantities: int) -> None:
        self._slots: dict[int, int] = {}
        self._sums = np.zeros((n_quantities, 0))
        self._counts = np.zeros(0, np.int64)

    def add(self, group_N: np.ndarray, value_CN: np.ndarray) -> None:
        """Adds N observations of every quantity."""
        grouping = Grouping(group_N)
        slots = [self._slots.setdefault(group, len(self._slots)) for group in grouping.groups.tolist()]
        if len(self._slots) > len(self._counts):
            spare = 2 * len(self._slots) - len(self._counts)
            self._sums = np.pad(self._sums, ((0, 0), (0, spare)))
            self._counts = np.pad(self._counts, (0, spare))
        self._sums[:, slots] += grouping.sums(value_CN)
        self._counts[slots] += grouping.counts

    @property
    def groups(self) -> np.ndarray:
        """Groups with at least one observation, ascending."""
        return np.asarray(sorted(self._slots), np.int64)

    def count(self) -> np.ndarray:
        """Observations of each of `groups`."""
        return self._counts[self._ordered]

    def mean(self) -> np.ndarray:
        """Means of the C quantities in each of `groups`, [C, P]."""
        return self._sums[:, self._ordered] / self.count()

    @property
    def _ordered(self) -> list[int]:
        return [self._slots[group] for group in sorted(self._slots)]


class Moments:
    """Mean and variance per dimension in float64, merged block by block (Chan, Golub and LeVeque 1979).

    `squares_D` is the sum of squared deviations from the mean.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean_D = np.zeros(width)
        self.squares_D = np.zeros(width)

    @classmethod
    def of(cls, count: int, mean_D: np.ndarray, squares_D: np.ndarray) -> "Moments":
        """Those of rows that were summed elsewhere."""
        moments = cls(len(mean_D))
        moments.count, moments.mean_D, moments.squares_D = count, mean_D, squares_D
        return moments

    def add(self, rows_ND: np.ndarray) -> None:
        """Adds N rows, as many at a time as stay in a core's cache."""
        step = max(1, MOMENTS_TOGETHER // max(len(self.mean_D), 1))
        for start in range(0, len(rows_ND), step):
            apart_ND = rows_ND[start : start + step].astype(np.float64)
            mean_D = apart_ND.mean(0)
            apart_ND -= mean_D
            self.merge(Moments.of(len(apart_ND), mean_D, np.einsum("nd,nd->d", apart_ND, apart_ND)))

    def merge(self, other: "Moments") -> None:
        """Adds the rows of another."""
        if not other.count:
            return
        total = self.count + other.count
        shift_D = other.mean_D - self.mean_D
        self.squares_D = self.squares_D + other.squares_D + shift_D**2 * (self.count * other.count / total)
        self.mean_D = self.mean_D + shift_D * (other.count / total)
        self.count = total

    def variance_D(self) -> np.ndarray:
        """Population variance; zero before the first row."""
        return self.squares_D / max(self.count, 1)


class Rows:
    """Columns gathered block by block, given back in one order whatever the blocks were."""

    def __init__(self) -> None:
        self._parts: dict[str, list[np.ndarray]] = {}

    def add(self, columns: Mapping[str, Any]) -> None:
        """Adds rows as equally long arrays."""
        for name, values in columns.items():
            self._parts.setdefault(name, []).append(np.asarray(values))

    def sorted_by(self, *keys: str) -> dict[str, np.ndarray]:
        """All columns, ordered by the given ones, the first key outermost."""
        whole = {name: np.concatenate(parts) for name, parts in self._parts.items()}
        if not whole:
            return {}
        order = np.lexsort([whole[key] for key in reversed(keys)])
        return {name: values[order] for name, values in whole.items()}


def _grown(array: np.ndarray, size: int, fill: float) -> np.ndarray:
    if len(array) == size:
        return array
    grown = np.full(size, fill, dtype=array.dtype)
    grown[: len(array)] = array
    return grown
