"""The K largest entries of every row, exactly, ties going to the lowest ids.

The k largest entries lie in the k groups whose own largest entries are largest. So with groups of M the maxima of V/M groups
are searched first: one cheap pass over the row. On a processor the k-th largest maximum is a bound that little more than k
entries reach, and these are sorted. Elsewhere the members of k groups are searched in the same way by torch, which is
fastest there with groups of 4.

Suffixes: N rows, V vocabulary, K entries wanted, M members of a group, G groups, C candidates.
"""

from math import isqrt
from typing import Any

import numpy as np

from diffing_core.lazy import torch

MEMBERS = 4
LAST_ID = np.uint64(2**32 - 1)
FEW = 2  # groups per entry wanted, below which a plain search is as fast


def largest(values_NV: Any, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and values of the k < V largest entries of each row, falling, [N, k]; of equals the lowest ids."""
    return _sorted_above_bound(values_NV.numpy(), k) if values_NV.device.type == "cpu" else _searched(values_NV, k)


def _sorted_above_bound(value_NV: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """As `largest`, of float32 on a processor."""
    n_rows, size = value_NV.shape
    place_E = np.flatnonzero(value_NV >= _bound_N(value_NV, k)[:, None])
    row_E, id_E = np.divmod(place_E, size)
    count_N = np.bincount(row_E, minlength=n_rows)
    column_E = np.arange(len(row_E)) - (np.cumsum(count_N) - count_N)[row_E]
    key_NC = np.zeros((n_rows, count_N.max()), np.uint64)
    key_NC[row_E, column_E] = _sort_key(value_NV.reshape(-1)[place_E], id_E)
    key_NC.sort(axis=1)
    id_NK = (LAST_ID - (key_NC[:, : -k - 1 : -1] & LAST_ID)).astype(np.int64)
    return id_NK, np.take_along_axis(value_NV, id_NK, 1)


def _bound_N(value_NV: np.ndarray, k: int) -> np.ndarray:
    """The k-th largest of the groups' maxima, which no more than k groups exceed; a group is every G-th entry."""
    n_rows, size = value_NV.shape
    n_members = isqrt(size // k)
    n_groups = size // n_members
    maximum_NG = value_NV[:, : n_members * n_groups].reshape(n_rows, n_members, n_groups).max(1)
    return np.partition(maximum_NG, n_groups - k, axis=1)[:, n_groups - k]


def _sort_key(value_E: np.ndarray, id_E: np.ndarray) -> np.ndarray:
    """uint64, of larger values larger and of equal values for lower ids larger."""
    bits_E = (value_E + np.float32(0)).view(np.uint32)  # −0 becomes 0
    rising_E = np.where(bits_E >> 31, ~bits_E, bits_E | np.uint32(1 << 31))
    return rising_E.astype(np.uint64) << np.uint64(32) | (LAST_ID - id_E.astype(np.uint64))


def _searched(values_NV: Any, k: int) -> tuple[np.ndarray, np.ndarray]:
    """As `largest`, by torch; one entry more than wanted is taken, so that rows with a tie across the cut show themselves."""
    value_NK, id_NK = _search(values_NV, k + 1, in_order=True)
    tied = torch.nonzero(value_NK[:, k - 1] == value_NK[:, k])[:, 0]
    value_NK, id_NK = value_NK[:, :k], id_NK[:, :k]
    if len(tied):
        id_NK[tied] = _lowest_ids(values_NV[tied], value_NK[tied], id_NK[tied])
    return id_NK.cpu().numpy(), value_NK.cpu().numpy()


def _search(values_NV: Any, k: int, *, in_order: bool) -> tuple[Any, Any]:
    """Values and ids of the k largest, of equals whichever; a group is every G-th entry, the rest are candidates."""
    n_groups = values_NV.shape[1] // MEMBERS
    if n_groups < FEW * k:
        return values_NV.topk(k, sorted=in_order)
    n_grouped = n_groups * MEMBERS
    values_NMG = values_NV[:, :n_grouped].unflatten(1, (MEMBERS, n_groups))
    _, group_NK = _search(values_NMG.amax(1), k, in_order=False)
    member_NMK = values_NMG.gather(2, group_NK[:, None].expand(-1, MEMBERS, -1))
    candidate_NC = torch.cat([member_NMK.flatten(1), values_NV[:, n_grouped:]], dim=1)
    value_NK, place_NK = candidate_NC.topk(k, sorted=in_order)
    id_NK = place_NK // k * n_groups + group_NK.gather(1, place_NK % k)
    return value_NK, torch.where(place_NK < MEMBERS * k, id_NK, place_NK - MEMBERS * k + n_grouped)


def _lowest_ids(values_RV: Any, value_RK: Any, id_RK: Any) -> Any:
    """Ids of R rows in which the entries equal to the smallest value taken are the first of their kind."""
    cut_R = value_RK[:, -1]
    n_above_R = (value_RK > cut_R[:, None]).sum(1)
    row_E, id_E = torch.nonzero(values_RV == cut_R[:, None], as_tuple=True)
    started_R = torch.searchsorted(row_E, torch.arange(len(cut_R), device=row_E.device))
    column_E = n_above_R[row_E] + torch.arange(len(row_E), device=row_E.device) - started_R[row_E]
    fits = column_E < value_RK.shape[1]
    id_RK[row_E[fits], column_E[fits]] = id_E[fits]
    return id_RK
