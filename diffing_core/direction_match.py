"""How well the leading left singular vectors u of a changed matrix are found among all those of the base.

    match = max_i |⟨u, u_i⟩|        c_i = ⟨u, u_i⟩        μ = Σ c_i² δ(σ_i²), the spectral measure of u in W₀W₀ᵀ

Exactly, this takes every u_i: two whole eigendecompositions of the smaller side. A bound from above takes none: n steps of
Lanczos from u on W₀W₀ᵀ give the first n polynomials p_k that are orthonormal in μ, and no point x has a mass above their
Christoffel function, so that

    match² <= max_x 1 / Σ_{k<n} p_k(x)²

With the nodes θ_l of the n-point Gauss quadrature, and y_0l and y_nl the first and last element of their vectors, that
function is (Σ_l y_0l t_l)² / Σ_l t_l², t_l = y_nl / (θ_l − x). It is taken at places that come closer to a node by 2^¼ each,
since nodes that are hardly coupled to the rest have narrow peaks; between two of them it is at most 0.2 % more. Equal σ_i are
one point of μ; products in float32 part them by some 10⁻⁷ of the largest σ², so nodes that near to each other count together.

A vector that the base has stands alone in μ, and the bound is tight; one that lies across many of the base's bulk is
bounded by the share of it that n polynomials cannot tell from one point.

With more outputs than inputs W₀W₀ᵀ has a null space, and a new direction lies mostly there: no node near 0 tells that mass
from a small σ_i's. It is taken out first: W₀ = Q R, and the part Qᵀu of u in W₀'s column space has the same c_i in R Rᵀ,
whose steps are on the smaller side.

A tuned matrix may be given as the base with its factors (updated_matrix.py) and is then never formed.

Suffixes: M rows (outputs), N columns (inputs), K vectors, S steps, L nodes, G gaps from either end, P places in them.

Reference: Shuttleworth et al. 2024 (intruder dimensions), arXiv 2410.21228; Golub and Meurant 2010 (Lanczos and quadrature);
Nevai 1986 (Christoffel functions).
"""

from typing import Any

import numpy as np

from diffing_core.lazy import torch
from diffing_core.spectra import ROWS_AT_ONCE, eigen, gram
from diffing_core.updated_matrix import UpdatedMatrix

_TOLERANCE = 1e-5  # of the leading vectors; products are float32
_HALVINGS, _PER_HALVING = 52, 4
_ROUNDING = 2.0**-52
_RESOLUTION = 1e-6  # of the largest eigenvalue: nodes that float32 may have made of one
_NOTHING = 1e-7  # of the largest eigenvalue: what float32 products cannot tell from 0
_BREAKDOWN = 1e-6  # of the largest eigenvalue: what is left of an exhausted Krylov space


def match_of_leading(base_MN: Any, tuned_MN: Any, n_leading: int) -> tuple[Any, Any, Any]:
    """The leading left singular vectors u_k of `tuned` and their best match in `base`: σ_k, max_i |⟨u_k, u_i⟩| and i.

    i counts from 1 and runs over all left singular vectors of the base: two whole eigendecompositions of the smaller
    side. Without a base no vector is found: 0, and i = 0.
    """
    tall = base_MN.shape[0] > base_MN.shape[1]
    gram_KK = gram(base_MN)
    base_sigma_K, base_KK = eigen(gram_KK)
    tuned_KK = tuned_MN.gram(gram_KK) if isinstance(tuned_MN, UpdatedMatrix) else gram(tuned_MN)
    sigma_K, vectors_KK = (part[..., :n_leading] for part in eigen(tuned_KK))
    if not len(base_sigma_K):
        return sigma_K, torch.zeros_like(sigma_K), torch.zeros(len(sigma_K), dtype=torch.int64)
    if tall:
        parts = zip(base_MN.split(ROWS_AT_ONCE), tuned_MN.split(ROWS_AT_ONCE), strict=True)
        back_NK = sum(base.double().T @ (tuned.double() @ vectors_KK) for base, tuned in parts)
        inner_KK = (back_NK / sigma_K).T @ base_KK / base_sigma_K
    else:
        inner_KK = vectors_KK.T @ base_KK
    match_K, place_K = inner_KK.abs().max(1)
    return sigma_K, match_K.clamp(max=1), place_K + 1


def bounded_match_of_leading(base_MN: Any, tuned_MN: Any, n_leading: int, n_steps: int, seed: int) -> tuple[Any, Any]:
    """The leading left singular vectors of `tuned`: σ_k, and a number that max_i |⟨u_k, u_i⟩| does not exceed.

    Costs two products with W₀ (M > N: its QR, then with R) of K columns a step, and 30 to 150 pairs with W_tuned of one column.
    """
    sigma_K, left_MK = _leading(tuned_MN, n_leading, seed)
    if not base_MN.any() or not len(sigma_K):
        return sigma_K, torch.zeros_like(sigma_K)
    square, start_K = _in_column_space(base_MN, left_MK) if len(base_MN) > base_MN.shape[1] else (base_MN, left_MK)
    alpha_SK, beta_SK = _lanczos(square, start_K, n_steps)
    mass_K = torch.tensor([_largest_mass(alpha_SK[:, k], beta_SK[:, k]) for k in range(len(sigma_K))], dtype=torch.float64)
    return sigma_K, (start_K.square().sum(0).clamp(max=1) * mass_K).sqrt()


def _in_column_space(matrix_MN: Any, left_MK: Any) -> tuple[Any, Any]:
    """R [N, N] of W = Q R, M > N, and Qᵀ of the vectors [N, K]: what W Wᵀ and they are in W's column space.

    Rows are taken in a few at a time, and Q is never formed: R of [R so far; next rows] is R of all of them.
    """
    n = matrix_MN.shape[1]
    at_once = max(n, ROWS_AT_ONCE)
    upper_NN, inside_NK = matrix_MN[:0], left_MK[:0].float()
    for rows, vectors in zip(matrix_MN.split(at_once), left_MK.float().split(at_once), strict=True):
        packed, tau_N = torch.geqrf(torch.cat([upper_NN, rows]))
        inside_NK = torch.ormqr(packed, tau_N, torch.cat([inside_NK, vectors]), left=True, transpose=True)[:n]
        upper_NN = packed[:n].triu()
    return upper_NN, inside_NK.double()


def _leading(matrix_MN: Any, n_leading: int, seed: int) -> tuple[Any, Any]:
    """Leading singular values and left vectors, float64, by restarted Lanczos on the smaller side; fewer of a lower rank."""
    from scipy.sparse.linalg import LinearOperator, eigsh

    is_tall = matrix_MN.shape[0] > matrix_MN.shape[1]
    wide = matrix_MN.T if is_tall else matrix_MN

    def gram(vector: np.ndarray) -> np.ndarray:
        return (wide @ (wide.T @ torch.as_tensor(vector.reshape(-1)).float())).double().numpy()

    side = wide.shape[0]
    k = min(n_leading, side - 1)
    start = np.random.default_rng(seed).standard_normal(side)
    if not gram(start).any():
        return torch.zeros(0, dtype=torch.float64), torch.zeros(matrix_MN.shape[0], 0, dtype=torch.float64)
    operator = LinearOperator((side, side), matvec=gram, dtype=np.float64)
    squares_K, vectors = eigsh(operator, k, v0=start, tol=_TOLERANCE, ncv=min(side, max(3 * k, 20)))
    order = np.argsort(-squares_K)
    order = order[squares_K[order] > _NOTHING * squares_K.max()]
    sigma_K = torch.as_tensor(squares_K[order].clip(min=0)).sqrt()
    vectors = torch.as_tensor(vectors[:, order].copy())
    return sigma_K, torch.nn.functional.normalize((matrix_MN @ vectors.float()).double(), dim=0) if is_tall else vectors


def _lanczos(matrix_MN: Any, start_MK: Any, n_steps: int) -> tuple[Any, Any]:
    """α and β of K recurrences on W Wᵀ at once, [S, K] each, reorthogonalised; β is 0 where a Krylov space ends.

    What the recurrence itself takes out goes first: one pass over all vectors then finds only the rest, which is small.
    """
    n_vectors, length = start_MK.shape[1], len(start_MK)
    vectors_KSM = torch.zeros(n_vectors, n_steps, length, dtype=torch.float64)
    alpha_SK, beta_SK = (torch.zeros(n_steps, n_vectors, dtype=torch.float64) for _ in range(2))
    vectors_KSM[:, 0] = torch.nn.functional.normalize(start_MK, dim=0).T
    for step in range(n_steps):
        now_KM, found_KSM = vectors_KSM[:, step], vectors_KSM[:, : step + 1]
        next_KM = (matrix_MN @ (now_KM.float() @ matrix_MN).T).T.double()
        alpha_SK[step] = (next_KM * now_KM).sum(1)
        next_KM -= alpha_SK[step, :, None] * now_KM
        if step:
            next_KM -= beta_SK[step - 1, :, None] * vectors_KSM[:, step - 1]
        inner_KS1 = found_KSM @ next_KM[:, :, None]
        next_KM = torch.baddbmm(next_KM[:, None], inner_KS1.mT, found_KSM, alpha=-1)[:, 0]
        size_K = next_KM.norm(dim=1)
        going_K = size_K > _BREAKDOWN * alpha_SK.amax()
        beta_SK[step] = size_K.where(going_K, 0.0)
        if step + 1 < n_steps:
            vectors_KSM[:, step + 1] = (next_KM / size_K[:, None]).where(going_K[:, None], 0.0)
    return alpha_SK, beta_SK


def _largest_mass(alpha_S: Any, beta_S: Any) -> float:
    """The most that a measure with these recurrence coefficients has at one point."""
    ended = (beta_S == 0).nonzero()
    n = int(ended[0]) + 1 if len(ended) else len(alpha_S)
    off = beta_S[: n - 1]
    node_L, vectors_LL = torch.linalg.eigh(torch.diag(alpha_S[:n]) + torch.diag(off, 1) + torch.diag(off, -1))
    first_L, last_L = vectors_LL[0], vectors_LL[-1]
    upto_L = first_L.square().cumsum(0)
    ends_L = torch.searchsorted(node_L, node_L + _RESOLUTION * node_L.abs().max(), right=True)
    weight = (upto_L[ends_L - 1] - upto_L + first_L.square()).max().item()
    if len(ended) or n == 1:  # the measure has these n points and no others
        return min(1.0, weight)
    gap = node_L.diff().clamp(min=_ROUNDING * node_L.abs().max())
    gap_G, from_G = torch.cat([gap, -gap]), torch.cat([node_L[:-1], node_L[1:]])
    share_P = 2.0 ** -(1 + torch.arange(_HALVINGS * _PER_HALVING, dtype=torch.float64) / _PER_HALVING)
    away_GPL = (node_L - from_G[:, None])[:, None] - (gap_G[:, None] * share_P)[:, :, None]
    term_GPL = away_GPL.reciprocal_().mul_(last_L)
    mass_GP = (term_GPL @ first_L / torch.linalg.vector_norm(term_GPL, dim=-1)).square()
    return min(1.0, max(weight, mass_GP.nan_to_num(1.0).max().item()))
