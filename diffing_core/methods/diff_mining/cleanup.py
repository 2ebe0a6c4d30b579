"""Token clean-up: which vocabulary entries a list may show, and which of them it shows as one.

Counting knows nothing of it: counts are kept per entry, and added up over a group where a list is made.

Suffixes: V vocabulary, G groups of entries that are listed as one.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diffing_core.blocks import StreamContext
from diffing_core.methods.diff_mining.settings import DiffMiningSettings

PUNCTUATION = ("P", "Sm", "Sc", "Sk")  # So, which has the emoji, is content: a finetune may well teach them


@dataclass(frozen=True)
class Groups:
    """The group of each vocabulary entry, [V], numbered from 0."""

    of_V: np.ndarray

    @classmethod
    def singly(cls, vocab_size: int) -> "Groups":
        """Every entry is a group of its own."""
        return cls(np.arange(vocab_size))

    def __len__(self) -> int:
        return int(self.of_V.max()) + 1

    def sums(self, values_V: np.ndarray) -> np.ndarray:
        """Sum over each group's members, float64 [G]."""
        return np.bincount(self.of_V, values_V)

    def counts(self, counts_V: np.ndarray) -> np.ndarray:
        """Sum over each group's members, int64 [G]; exact below 2⁵³."""
        return self.sums(counts_V).astype(np.int64)

    def means(self, values_V: np.ndarray) -> np.ndarray:
        """Mean over each group's members, float64 [G]."""
        return self.sums(values_V) / np.bincount(self.of_V)

    def foremost(self, weight_V: np.ndarray) -> np.ndarray:
        """The member of each group with the largest weight, of equals the lowest id, [G]."""
        order = np.lexsort((-weight_V, self.of_V))
        return order[np.unique(self.of_V[order], return_index=True)[1]]


@dataclass(frozen=True)
class CleanUp:
    """What the settings make of a vocabulary: entries that may be listed, their groups, and how a list names them."""

    listable_V: np.ndarray
    groups: Groups
    merges: bool

    @classmethod
    def of(cls, context: StreamContext, settings: DiffMiningSettings) -> "CleanUp":
        """Decodes every entry; only those that may be listed are merged."""
        texts = context.token_texts(range(context.vocab_size))
        listable_V = np.ones(len(texts), bool)
        if settings.readable_only:
            listable_V &= context.readable_V
        if settings.drop_punctuation:
            listable_V &= [not is_punctuation(text) for text in texts]
        groups = _variants(texts, listable_V) if settings.merge_variants else Groups.singly(len(texts))
        return cls(listable_V, groups, settings.merge_variants)

    def named(self, texts: Sequence[str]) -> list[str]:
        """Token texts as a list shows them."""
        return [bare(text) for text in texts] if self.merges else list(texts)


def is_punctuation(text: str) -> bool:
    """Whether a token is nothing but punctuation, mathematical signs, currency signs and accents."""
    return bool(text.strip()) and all(unicodedata.category(each).startswith(PUNCTUATION) for each in text.strip())


def bare(text: str) -> str:
    """What variants of a token have in common."""
    return text.strip().lower()


def _variants(texts: Sequence[str], listable_V: np.ndarray) -> Groups:
    keys = [bare(text) if listable_V[token] else f"\0{token}" for token, text in enumerate(texts)]
    return Groups(np.unique(np.asarray(keys), return_inverse=True)[1])
