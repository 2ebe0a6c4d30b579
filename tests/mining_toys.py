"""Given differences in the place of models, mined: for the tests of `diff_mining`."""

from collections.abc import Iterable, Iterator
from types import SimpleNamespace

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from diffing_core.blocks import StreamContext, TokenBlock
from diffing_core.corpus import ProbeCorpus, ProbeSequence
from diffing_core.methods.base import Tables
from diffing_core.methods.diff_mining import METHOD
from diffing_core.methods.diff_mining.fold import DiffMiningFold

PLAIN = {"min_probability": 0, "readable_only": False}
ORDERINGS, VOCABULARY, TOPICS, POSITIONS, COOCCURRENCE, WINDOWS = (spec.name for spec in METHOD.tables)

NOBODY = SimpleNamespace(device=torch.device("cpu"))  # a model that no fold under test runs


class FakeSide:
    """A side whose log-probabilities are given."""

    def __init__(self, logprob_NV: np.ndarray) -> None:
        self._logprob_NV = torch.from_numpy(np.asarray(logprob_NV, np.float32))

    def logprobs(self) -> torch.Tensor:
        return self._logprob_NV

    @property
    def summed_probability_V(self) -> torch.Tensor:
        return self._logprob_NV.exp().sum(0)


def tokenizer_of(words: Iterable[str]) -> PreTrainedTokenizerFast:
    words = list(words)
    whole = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[0]))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    whole.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=whole, eos_token=words[0], clean_up_tokenization_spaces=False)


def corpus_of(lengths: Iterable[int], vocab_size: int = 2) -> ProbeCorpus:
    draw = np.random.default_rng(0)
    sequences = tuple(
        ProbeSequence(draw.integers(vocab_size, size=n).astype(np.int32), np.zeros(n, np.int8), np.zeros(n, bool))
        for n in lengths
    )
    return ProbeCorpus("toy", sequences, len(sequences))


def context_of(words: Iterable[str], corpus: ProbeCorpus) -> StreamContext:
    words = list(words)
    return StreamContext(
        base=NOBODY, tuned=NOBODY, tokenizer=tokenizer_of(words), corpus=corpus,
        n_layers=1, d_model=1, vocab_size=len(words),
    )  # fmt: skip


def words_of(vocab_size: int) -> list[str]:
    return ["<eos>", *(f"w{index}" for index in range(1, vocab_size))]


def blocks_of(
    corpus: ProbeCorpus, base_MV: np.ndarray, tuned_MV: np.ndarray, cuts: Iterable[np.ndarray]
) -> Iterator[TokenBlock]:
    """The corpus, one sequence after another, in blocks of the given rows."""
    lengths = [len(sequence) for sequence in corpus.sequences]
    token_M, role_M, template_M = (
        np.concatenate([getattr(sequence, name) for sequence in corpus.sequences])
        for name in ("token_T", "role_T", "template_T")
    )
    sequence_M = np.repeat(np.arange(len(lengths)), lengths)
    position_M = np.concatenate([np.arange(length) for length in lengths])
    next_M = np.roll(token_M, -1)
    next_M[np.cumsum(lengths) - 1] = -1
    for rows in cuts:
        yield TokenBlock(
            *(torch.from_numpy(each[rows].astype(np.int64)) for each in (token_M, next_M)),
            *(each[rows] for each in (sequence_M, position_M, role_M, template_M)),
            FakeSide(base_MV[rows]), FakeSide(tuned_MV[rows]),
        )  # fmt: skip


def mine(
    difference_MV: np.ndarray,
    lengths: list[int] | ProbeCorpus,
    *,
    words: list[str] | None = None,
    base_MV: np.ndarray | None = None,
    cuts: Iterable[np.ndarray] | None = None,
    **settings: object,
) -> Tables:
    """Tables of given differences [positions, V]; `cuts` are the rows of each block, by default seven at a time."""
    fold = folded(difference_MV, lengths, words=words, base_MV=base_MV, cuts=cuts, **settings)
    return fold.finish()


def folded(
    difference_MV: np.ndarray,
    lengths: list[int] | ProbeCorpus,
    *,
    words: list[str] | None = None,
    base_MV: np.ndarray | None = None,
    cuts: Iterable[np.ndarray] | None = None,
    **settings: object,
) -> DiffMiningFold:
    """The fold before its end."""
    n, vocab_size = difference_MV.shape
    corpus = lengths if isinstance(lengths, ProbeCorpus) else corpus_of(lengths)
    fold = DiffMiningFold(context_of(words or words_of(vocab_size), corpus), METHOD.settings(**PLAIN | settings))
    base_MV = np.zeros_like(difference_MV) if base_MV is None else base_MV
    cuts = np.array_split(np.arange(n), -(-n // 7)) if cuts is None else cuts
    for block in blocks_of(corpus, base_MV, base_MV + difference_MV, cuts):
        fold.update(block)
    return fold


def listed(tables: Tables, ordering: str) -> list[dict]:
    return [row for row in tables[ORDERINGS].to_pylist() if row["ordering"] == ordering]


def random_differences(seed: int, n: int, vocab_size: int) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return (draw.normal(size=(n, vocab_size)) + 0.5 * draw.normal(size=vocab_size)).astype(np.float32)


def counts_by_sorting(difference_MV: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    order_MV = np.argsort(-difference_MV.astype(np.float64), axis=1, kind="stable")
    vocab_size = difference_MV.shape[1]
    ends = order_MV[:, :k], order_MV[:, -k:]
    return tuple(np.bincount(end.ravel(), minlength=vocab_size) for end in ends)
