"""How alike two layers are, of one model or of two, read on the same tokens.

    linear CKA = ‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖)      X, Y centred, Frobenius norms: 1 if they agree up to rotation and one scale

Reference: Kornblith et al. 2019, https://arxiv.org/abs/1905.00414.

Suffixes: N tokens, D and E widths, L layers.
"""

from typing import Any

import numpy as np


def linear_cka(left_ND: Any, right_NE: Any) -> float:
    """Linear CKA of two sets of vectors of the same N tokens, float64; 0 if the vectors of either do not differ at all.

    Through the N × N products where there are fewer tokens than dimensions, which gives the same number.
    """
    left_ND, right_NE = (each.double() - each.double().mean(0) for each in (left_ND, right_NE))
    if len(left_ND) < max(left_ND.shape[1], right_NE.shape[1]):
        left_NN, right_NN = left_ND @ left_ND.T, right_NE @ right_NE.T
        shared, own = float((left_NN * right_NN).sum()), float(left_NN.norm() * right_NN.norm())
    else:
        shared = float((left_ND.T @ right_NE).square().sum())
        own = float((left_ND.T @ left_ND).norm() * (right_NE.T @ right_NE).norm())
    return shared / own if own > 0 else 0.0


def matched_share(similarity_LL: np.ndarray) -> float:
    """Layer matching accuracy: share of layers i of one model whose most similar layer of the other is i."""
    return float((similarity_LL.argmax(1) == np.arange(len(similarity_LL))).mean())
