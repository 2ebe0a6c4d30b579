"""The K largest and the K smallest entries of every row, exactly, ties going to the lowest ids.

The k largest of V entries lie in the k groups whose largest entries are largest, so V/m maxima and then
k·m candidates are searched instead of V. With m = √(V/k) both searches are of √(V·k).

Suffixes: N rows, V vocabulary, K entries wanted, M members of a group, G groups, C candidates.
"""

from typing import Any

import numpy as np

from diffing_core.lazy import torch


def largest(values_NV: Any, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and values of the k < V largest entries of each row, falling, [N, k]; of equals the lowest ids.

    One entry more than wanted is taken, so that rows with a tie across the cut show themselves.
    """
    value_NK, id_NK = _by_groups(values_NV, k + 1)
    tied = torch.nonzero(value_NK[:, k - 1] == value_NK[:, k])[:, 0]
    value_NK, id_NK = value_NK[:, :k], id_NK[:, :k]
    if len(tied):
        id_NK[tied] = _lowest_ids(values_NV[tied], value_NK[tied], id_NK[tied])
    return id_NK.cpu().numpy(), value_NK.cpu().numpy()


def _by_groups(values_NV: Any, k: int) -> tuple[Any, Any]:
    """Values and ids of the k largest, of equals whichever; a group is every G-th entry."""
    n_rows, n_values = values_NV.shape
    n_members = round((n_values / k) ** 0.5)
    n_groups = n_values // n_members
    if n_groups < k or n_members == 1:
        return values_NV.topk(k)
    grouped = n_groups * n_members
    values_NMG = values_NV[:, :grouped].unflatten(1, (n_members, n_groups))
    group_NK = values_NMG.amax(1).topk(k, sorted=False).indices
    member_NMK = values_NMG.gather(2, group_NK[:, None].expand(-1, n_members, -1))
    candidate_NC = torch.cat([member_NMK.flatten(1), values_NV[:, grouped:]], dim=1)
    value_NK, place_NK = candidate_NC.topk(k)
    id_NK = place_NK // k * n_groups + group_NK.gather(1, place_NK % k)
    return value_NK, torch.where(place_NK < n_members * k, id_NK, place_NK - n_members * k + grouped)


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
