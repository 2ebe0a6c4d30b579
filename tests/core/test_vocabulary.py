"""Token texts: decoded once per tokenizer, and never those of another one."""

import gc
import weakref

import numpy as np
import pytest

from diffing_core.vocabulary import Vocabulary, vocabulary_of


class Words:
    """A tokenizer that knows how often it was asked; equal-looking ones are still different tokenizers."""

    def __init__(self, *texts: str, special: tuple[int, ...] = ()) -> None:
        self.texts, self.all_special_ids, self.n_asked = texts, special, 0

    def batch_decode(self, ids: list[list[int]]) -> list[str]:
        self.n_asked += 1
        return [self.texts[number] for [number] in ids]


def test_a_vocabulary_is_decoded_once_per_tokenizer_and_size() -> None:
    words = Words("a", " ", "<s>", "\ufffd", "b", special=(2, 4))
    first = vocabulary_of(words, 4)
    assert vocabulary_of(words, 4) is first
    assert words.n_asked == 1
    assert first.text_V.tolist() == ["a", " ", "<s>", "\ufffd"]
    assert first.readable_V.tolist() == [True, False, False, False]
    assert first.of(np.asarray([2, 0])) == ["<s>", "a"]
    assert len(vocabulary_of(words, 5).text_V) == 5
    assert words.n_asked == 2


def test_tokenizers_do_not_share_a_vocabulary_and_take_theirs_with_them() -> None:
    one, other = Words("a", "b"), Words("b", "a")
    assert vocabulary_of(one, 2).of([0]) == ["a"]
    assert vocabulary_of(other, 2).of([0]) == ["b"]
    kept = weakref.ref(vocabulary_of(one, 2))
    del one
    gc.collect()
    assert kept() is None


def test_nobody_can_write_into_what_is_shared() -> None:
    vocabulary = Vocabulary(Words("a", "b"), 2)
    with pytest.raises(ValueError, match="read-only"):
        vocabulary.readable_V &= False
