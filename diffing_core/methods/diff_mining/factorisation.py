"""Non-negative factorisation of a sparse matrix, X ≈ H W, by Frobenius or Kullback–Leibler divergence.

With an orthogonality weight λ, the plain fit is refined by multiplicative updates of both factors; each adds
to its denominator the gradient of the penalty λ Σ_{t < u} Σ_i P[i, t] P[i, u]:

    H ← H ∘ numerator_H / (denominator_H + λ (H 1 − H))        W likewise, over tokens

which drives one topic per position and one per token (by Kullback–Leibler the latter only nearly: a token
that occurs under two topics must have weight in both). X is scaled to a mean entry of 1, so that λ means the
same for nats and for occurrences, and both factors are kept of one size, or the penalty could be evaded by
making one factor small and the other large.

References: Lee and Seung 1999 and 2001 (updates); Choi 2008 (orthogonality); scikit-learn's NMF.
Suffixes: P positions, C tokens, T topics, E entries of X that are not 0.
"""

import warnings
from typing import Any

import numpy as np

from diffing_core.methods.diff_mining.settings import DiffMiningSettings

TOLERANCE = {"frobenius": 1e-3, "kullback-leibler": 1e-4}  # topics of a full fit to four digits, in half the time
SMALL = 1e-12
FLOOR = 1e-4  # of the mean: a factor that starts at 0 would stay there


def factorise(matrix: Any, n_topics: int, settings: DiffMiningSettings) -> tuple[np.ndarray, np.ndarray]:
    """H [P, T] and W [T, C]; the same for the same seed."""
    activation_PT, weight_TC = _plain(matrix, n_topics, settings)
    if not settings.nmf_orthogonality:
        return activation_PT, weight_TC
    return _orthogonal(matrix, activation_PT.astype(np.float64), weight_TC.astype(np.float64), settings)


def _plain(matrix: Any, n_topics: int, settings: DiffMiningSettings) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.decomposition import NMF
    from sklearn.exceptions import ConvergenceWarning

    model = NMF(
        n_topics,
        init="nndsvda",
        solver="cd" if settings.nmf_loss == "frobenius" else "mu",
        beta_loss=settings.nmf_loss,
        max_iter=settings.nmf_iterations,
        tol=TOLERANCE[settings.nmf_loss],
        random_state=settings.seed,
    )
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):  # an exact fit may leave a loss of −1e-9
        warnings.simplefilter("ignore", ConvergenceWarning)  # nmf_iterations is a budget, not a promise
        activation_PT = model.fit_transform(matrix)
    return activation_PT, model.components_


def _orthogonal(
    matrix: Any, activation_PT: np.ndarray, weight_TC: np.ndarray, settings: DiffMiningSettings
) -> tuple[np.ndarray, np.ndarray]:
    scale = matrix.data.mean()
    scaled, penalty = matrix / scale, settings.nmf_orthogonality
    turned = scaled.T.tocsr()
    activation_PT, weight_CT = _balanced(activation_PT / scale, weight_TC.T)
    activation_PT, weight_CT = (np.maximum(each, FLOOR * each.mean()) for each in (activation_PT, weight_CT))
    for _ in range(settings.nmf_iterations):
        activation_PT = updated(scaled, activation_PT, weight_CT, settings.nmf_loss, penalty)
        weight_CT = updated(turned, weight_CT, activation_PT, settings.nmf_loss, penalty)
        activation_PT, weight_CT = _balanced(activation_PT, weight_CT)
    return activation_PT * scale, weight_CT.T


def _balanced(first_PT: np.ndarray, second_CT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same product with both factors of one mean per topic."""
    ratio_T = np.sqrt(np.maximum(second_CT.mean(0), SMALL) / np.maximum(first_PT.mean(0), SMALL))
    return first_PT * ratio_T, second_CT / ratio_T


def updated(matrix: Any, moved_PT: np.ndarray, fixed_CT: np.ndarray, loss: str, penalty: float) -> np.ndarray:
    """The factor of the matrix's rows [P, T] after one multiplicative step; `fixed_CT` is that of its columns."""
    if loss == "frobenius":
        numerator_PT, denominator_PT = matrix @ fixed_CT, moved_PT @ (fixed_CT.T @ fixed_CT)
    else:
        numerator_PT, denominator_PT = _ratios(matrix, moved_PT, fixed_CT) @ fixed_CT, fixed_CT.sum(0)
    crowding_PT = moved_PT.sum(1, keepdims=True) - moved_PT
    return moved_PT * numerator_PT / np.maximum(denominator_PT + penalty * crowding_PT, SMALL)


def _ratios(matrix: Any, moved_PT: np.ndarray, fixed_CT: np.ndarray) -> Any:
    """X / (H W) at the entries of X, sparse."""
    row_E = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    fitted_E = np.einsum("et,et->e", moved_PT[row_E], fixed_CT[matrix.indices])
    ratios = matrix.copy()
    ratios.data = matrix.data / np.maximum(fitted_E, SMALL)
    return ratios
