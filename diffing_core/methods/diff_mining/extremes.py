"""The K largest entries of every row, exactly, ties going to the lowest ids.

The k largest entries lie in the k groups whose own largest entries are largest. So with groups of 4 the
maxima of V/4 groups are searched first, in the same way, and then 4 k candidates: one cheap pass over the
row and a few searches among hundreds, where a plain search sifts all V.

Suffixes: N rows, V vocabulary, K entries wanted, M members of a group, G groups, C candidates.
"""

from typing import Any

import numpy as np

from diffing_core.lazy import torch

MEMBERS = 4
FEW = 2  # groups per entry wanted, below which a plain search is as fast


def largest(values_NV: Any, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and values of the k < V largest entries of each row, falling, [N, k]; of equals the lowest ids.

    One entry more than wanted is taken, so that rows with a tie across the cut show themselves.
    """
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
