"""The K largest entries of every row, exactly, ties going to the lowest ids.

The k largest entries lie in the k groups whose own largest entries are largest. So with groups of M the maxima of V/M groups
are searched first, and then the members of k groups: one cheap pass over the row and two searches among far fewer.
On a processor the searches are NumPy's partitions, elsewhere torch's, which is fastest there with groups of 4, searched
among in the same way.

Suffixes: N rows, V vocabulary, K entries wanted, M members of a group, G groups, C candidates.
"""

from math import isqrt
from typing import Any

import numpy as np

from diffing_core.lazy import torch

MEMBERS = 4
FEW = 2  # groups per entry wanted, below which a plain search is as fast


def largest(values_NV: Any, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and values of the k < V largest entries of each row, falling, [N, k]; of equals the lowest ids.

    One entry more than wanted is taken, so that rows with a tie across the cut show themselves.
    """
    on_processor = values_NV.device.type == "cpu"
    value_NK, id_NK = _search_on_processor(values_NV, k + 1) if on_processor else _search(values_NV, k + 1, in_order=True)
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


def _search_on_processor(values_NV: Any, k: int) -> tuple[Any, Any]:
    """As `_search`, in order; √(V/k) members make both partitions equally long."""
    value_NV = values_NV.numpy()
    n_rows, size = value_NV.shape
    n_members = isqrt(size // k)
    if n_members == 1:
        return tuple(map(torch.from_numpy, _partitioned(value_NV, k)))
    n_groups = size // n_members
    n_grouped = n_members * n_groups
    maximum_NG = value_NV[:, :n_grouped].reshape(n_rows, n_members, n_groups).max(1)
    group_NK = np.argpartition(maximum_NG, n_groups - k, axis=1)[:, -k:]
    member_NC = (group_NK[:, None] + np.arange(n_members)[:, None] * n_groups).reshape(n_rows, -1)
    rest_NC = np.broadcast_to(np.arange(n_grouped, size), (n_rows, size - n_grouped))
    candidate_NC = np.concatenate([member_NC, rest_NC], axis=1)
    value_NK, place_NK = _partitioned(_taken(value_NV, candidate_NC), k)
    return torch.from_numpy(value_NK), torch.from_numpy(_taken(candidate_NC, place_NK))


def _partitioned(value_NC: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Values and places of the k largest, falling."""
    place_NK = np.argpartition(value_NC, value_NC.shape[1] - k, axis=1)[:, -k:]
    place_NK = _taken(place_NK, np.argsort(-_taken(value_NC, place_NK), axis=1))
    return _taken(value_NC, place_NK), place_NK


def _taken(value_NC: np.ndarray, place_NK: np.ndarray) -> np.ndarray:
    """Entries of each row, [N, K]: take_along_axis, in half its time."""
    n_rows, size = value_NC.shape
    return value_NC.take(place_NK + np.arange(0, n_rows * size, size)[:, None])


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
