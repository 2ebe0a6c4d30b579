"""How alike two layers are, of one model or of two, read on the same tokens.

    linear CKA = ‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖)      X, Y centred, Frobenius norms: 1 if they agree up to rotation and one scale

Reference: Kornblith et al. 2019, https://arxiv.org/abs/1905.00414.

Suffixes: N tokens, D and E widths, L layers.
"""

from functools import cached_property
from typing import Any

import numpy as np


class Centred:
    """Vectors [N, D] to be compared with many others: centred in float64, their product with themselves made once.

    Where there are fewer tokens than dimensions, only the N × N product is kept.
    """

    def __init__(self, row_ND: Any) -> None:
        centred_ND = row_ND.double() - row_ND.double().mean(0)
        self.is_wide = len(row_ND) < row_ND.shape[1]
        if self.is_wide:
            self.gram_NN = centred_ND @ centred_ND.T
        else:
            self.row_ND = centred_ND

    @cached_property
    def gram_NN(self) -> Any:
        """Inner products of tokens."""
        return self.row_ND @ self.row_ND.T

    @cached_property
    def gram_norm(self) -> Any:
        """‖XXᵀ‖."""
        return self.gram_NN.norm()

    @cached_property
    def feature_norm(self) -> Any:
        """‖XᵀX‖, the same number by another product."""
        return (self.row_ND.T @ self.row_ND).norm()


def linear_cka(left: Any, right: Any) -> float:
    """Linear CKA of two sets of vectors of the same N tokens, float64; 0 if the vectors of either do not differ at all.

    Each is [N, D], or `Centred` if it is compared more than once. Through the N × N products where there are fewer tokens than
    dimensions, which gives the same number.
    """
    left, right = (each if isinstance(each, Centred) else Centred(each) for each in (left, right))
    if left.is_wide or right.is_wide:
        shared, own = float((left.gram_NN * right.gram_NN).sum()), float(left.gram_norm * right.gram_norm)
    else:
        shared = float((left.row_ND.T @ right.row_ND).square().sum())
        own = float(left.feature_norm * right.feature_norm)
    return shared / own if own > 0 else 0.0


def matched_share(similarity_LL: np.ndarray) -> float:
    """Layer matching accuracy: share of layers i of one model whose most similar layer of the other is i."""
    return float((similarity_LL.argmax(1) == np.arange(len(similarity_LL))).mean())
