"""Words that models say more often the larger their dose of a change; the models answered the same prompts alike drawn.

    T = Σ_s Σ_a (w_a − w̄) x_sa        var T = Σ_s k_s (A − k_s) / (A (A − 1)) · Σ_a (w_a − w̄)²        z = T / √var T

x_sa: whether answer s of model a has the word, k_s = Σ_a x_sa, w_a: dose of model a, A models. The null hypothesis is
that, given how many models said the word in answer s, any of them may have been those: models share prompts and random
numbers, so answers are compared within s only. A word that all or none say there counts for nothing. Positive: the
word comes with the dose. Doses 0 and 1 compare two groups of models. `monotone` is Spearman's correlation of dose and
number of answers.

Suffixes: S answers, A models, W words.
Reference: Mantel 1963 (extension of the Mantel–Haenszel test to scores).
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diffing_core.stats import benjamini_hochberg

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


@dataclass(frozen=True, eq=False)
class WordTrends:
    """Words by falling z, with the number of answers of each model that have them."""

    words: list[str]
    n_texts_WA: np.ndarray
    z_W: np.ndarray
    p_W: np.ndarray
    q_W: np.ndarray
    monotone_W: np.ndarray

    def z_of(self) -> dict[str, float]:
        """z by word."""
        return dict(zip(self.words, self.z_W.tolist(), strict=True))


def words_of(text: str) -> list[str]:
    """The words of a text, lower-cased, in order."""
    return _WORD.findall(text.lower())


def word_trends(words_AS: Sequence[Sequence[Sequence[str]]], dose_A: Sequence[float], min_texts: int) -> WordTrends:
    """Trends of all words that occur in at least `min_texts` answers of all models together.

    Args:
        words_AS: for every model the words of each of its answers; the s-th answers belong together.
        dose_A: dose of every model.
        min_texts: see above.
    """
    found_AS = [[set(words) for words in answers] for answers in words_AS]
    n_with = Counter(word for answers in found_AS for words in answers for word in words)
    listed = sorted(word for word, count in n_with.items() if count >= min_texts)
    present_WSA = np.zeros((len(listed), len(words_AS[0]), len(words_AS)), dtype=bool)
    places = {word: place for place, word in enumerate(listed)}
    for a, answers in enumerate(found_AS):
        for s, words in enumerate(answers):
            present_WSA[[places[word] for word in words if word in places], s, a] = True
    z_W = trend_z(present_WSA, np.asarray(dose_A, float))
    p_W = _two_sided(z_W)
    n_texts_WA = present_WSA.sum(1)
    order = np.lexsort((np.arange(len(listed)), -z_W))
    q_W = np.asarray(benjamini_hochberg(p_W.tolist()))
    monotone_W = _rank_correlation(n_texts_WA, np.asarray(dose_A, float))
    return WordTrends([listed[place] for place in order], n_texts_WA[order], z_W[order], p_W[order], q_W[order], monotone_W[order])


def trend_z(present_WSA: np.ndarray, dose_A: np.ndarray) -> np.ndarray:
    """z of every word [W]; 0 where all answers agree over the models."""
    n_models = len(dose_A)
    centred_A = dose_A - dose_A.mean()
    total_W = (present_WSA @ centred_A).sum(1)
    k_WS = present_WSA.sum(2)
    variance_W = (k_WS * (n_models - k_WS)).sum(1) * (centred_A**2).sum() / (n_models * max(n_models - 1, 1))
    return np.divide(total_W, np.sqrt(variance_W), out=np.zeros(len(total_W)), where=variance_W > 0)


def unlikeness(words: Sequence[str], z: dict[str, float]) -> float:
    """Σ z / √n over the distinct words that have one (Stouffer's sum): how much a text is made of such words."""
    listed = [z[word] for word in sorted(set(words)) if word in z]
    return sum(listed) / len(listed) ** 0.5 if listed else 0.0


def _two_sided(z_W: np.ndarray) -> np.ndarray:
    from scipy.special import erfc

    return erfc(np.abs(z_W) / 2**0.5)


def _rank_correlation(n_WA: np.ndarray, dose_A: np.ndarray) -> np.ndarray:
    """Spearman's correlation of each row with the doses; 0 for a row without variation."""
    from scipy.stats import rankdata

    if not len(n_WA):
        return np.zeros(0)
    ranks_WA = rankdata(n_WA, axis=1) - (len(dose_A) + 1) / 2
    dose_rank_A = rankdata(dose_A) - (len(dose_A) + 1) / 2
    size_W = np.sqrt((ranks_WA**2).sum(1) * (dose_rank_A**2).sum())
    return np.divide(ranks_WA @ dose_rank_A, size_W, out=np.zeros(len(n_WA)), where=size_W > 0)
