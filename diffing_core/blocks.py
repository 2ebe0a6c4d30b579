"""A block of probe tokens with what base and tuned say about each of them.

The valid tokens of a batch are one block. Folds of residuals see it whole on a GPU, which should not wait, and in pieces
that stay in a core's cache on a processor. For folds of log-probabilities it is cut too: logits are computed for pieces
of many rows, which the head's product likes, and shown in tiles that fit in a core's cache, which everything after it
likes. What one fold derives of a tile is shared with the rest. Nothing of shape [tokens, vocabulary] outlives its piece.

Suffixes: N tokens of the block, D width, V vocabulary, K top-k.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from diffing_core.corpus import ProbeCorpus
from diffing_core.elementwise import exp
from diffing_core.errors import UndeclaredNeedError
from diffing_core.lazy import torch
from diffing_core.vocabulary import Vocabulary, vocabulary_of

VALUES_PER_BLOCK = {"cpu": 2**22, "cuda": 2**26}  # logits of one side: rows enough for an efficient head
VALUES_PER_TILE = {"cpu": 2**18, "cuda": 2**26}  # a dozen arrays of this size stay in the caches of a core
RESIDUAL_ROWS = {"cpu": 512}  # residuals of one layer stay in a core's cache; elsewhere a whole batch at a time
LEAST_BLOCK_ROWS = 64  # for large vocabularies: the head's weights are read once per block


def rows_per_block(vocab_size: int, device: Any) -> int:
    """Tokens whose logits are computed together."""
    return max(LEAST_BLOCK_ROWS, VALUES_PER_BLOCK.get(device.type, VALUES_PER_BLOCK["cpu"]) // vocab_size)


def rows_of_residuals(device: Any, n_tokens: int) -> int:
    """Tokens that folds of residuals are shown together."""
    return RESIDUAL_ROWS.get(device.type, n_tokens)


def rows_per_tile(vocab_size: int, device: Any) -> int:
    """Tokens that folds are shown together where they read log-probabilities."""
    return max(1, VALUES_PER_TILE.get(device.type, VALUES_PER_TILE["cpu"]) // vocab_size)


@dataclass(frozen=True, eq=False)
class StreamContext:
    """What a fold may know before the first block.

    `base` and `tuned` are the two model sides (`diffing_core.models.Subject`); folds use them only to
    read vectors through norm and head. `store` is the pass's ActivationStore, if there is one.
    """

    base: Any
    tuned: Any
    tokenizer: Any
    corpus: ProbeCorpus
    n_layers: int
    d_model: int
    vocab_size: int
    store: Any = None

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return vocabulary_of(self.tokenizer, self.vocab_size)

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """Each token decoded on its own."""
        return self._vocabulary.of(ids)

    @property
    def readable_V(self) -> np.ndarray:
        """Which vocabulary entries a person can read, bool [V]."""
        return self._vocabulary.readable_V

    def pick_layers(self, wanted: Sequence[int | float] | None) -> tuple[int, ...]:
        """Layers as indices: None is all, an int is a block, a fraction r is floor(r · (L − 1))."""
        return pick_layers(wanted, self.n_layers)


def pick_layers(wanted: Sequence[int | float] | None, n_layers: int) -> tuple[int, ...]:
    """The project's one convention for naming layers; layer i is the output of block i, from 0."""
    if wanted is None:
        return tuple(range(n_layers))
    picked = {each if isinstance(each, int) else int(each * (n_layers - 1)) for each in wanted}
    beyond = sorted(layer for layer in picked if not 0 <= layer < n_layers)
    if beyond:
        raise UndeclaredNeedError(f"layer(s) {beyond} asked of a model with {n_layers} blocks (0 … {n_layers - 1})")
    return tuple(sorted(picked))


def nearest_layers(depths: Sequence[float], read: Collection[int], n_layers: int) -> set[int]:
    """For every relative depth the layer nearest to it of those that were read; none where none was."""
    places = [int(depth * (n_layers - 1)) for depth in depths] if read else []
    return {min(read, key=lambda layer: (abs(layer - place), layer)) for place in places}


class Side:
    """One model's view of a block. Shared between all pairs that have this side in common."""

    def __init__(
        self, residuals: Mapping[int, Any], last_layer: int, readout: Callable[[Any], Any], vocab_size: int
    ) -> None:
        self._residuals = residuals
        self._last_layer = last_layer
        self._readout = readout
        self._vocab_size = vocab_size
        self._logits: dict[int, Any] = {}
        self._logprobs: dict[int, Any] = {}

    def cut(self, rows: slice) -> "Side":
        """The same view of some of the rows; logits that are computed already are not computed again."""
        residuals = {layer: state_ND[rows] for layer, state_ND in self._residuals.items()}
        piece = Side(residuals, self._last_layer, self._readout, self._vocab_size)
        piece._logits = {layer: logit_NV[rows] for layer, logit_NV in self._logits.items()}
        return piece

    def cooled(self, temperature: float) -> "Side":
        """This view with the final logits divided by a temperature."""
        view = Side({}, self._last_layer, self._readout, self._vocab_size)
        view._logits = {self._last_layer: self.logits().float() / temperature}
        return view

    def residual(self, layer: int) -> Any:
        """Output of block `layer`, [N, D], in the model's dtype."""
        return self._residuals[layer]

    def logits(self, layer: int | None = None) -> Any:
        """Logits through this model's own norm and head, [N, V] in its own dtype; None = final."""
        at = self._last_layer if layer is None else layer
        if at not in self._logits:
            self._logits[at] = self._readout(self._residuals[at])[:, : self._vocab_size]
        return self._logits[at]

    def logprobs(self, layer: int | None = None) -> Any:
        """log p(next token) through this model's own norm and head, float32 [N, V]; None = final."""
        at = self._last_layer if layer is None else layer
        if at not in self._logprobs:
            self._logprobs[at] = torch.log_softmax(self.logits(at).float(), dim=-1)
        return self._logprobs[at]

    @cached_property
    def probability_NV(self) -> Any:
        """p(next token), float32 [N, V]."""
        return exp(self.logprobs())

    @cached_property
    def summed_probability_V(self) -> Any:
        """p(next token) summed over the tokens, float32 [V]."""
        return self.probability_NV.sum(0)


@dataclass(frozen=True)
class TokenBlock:
    """N valid tokens, in sequence order, with both sides. Padding never enters a block.

    Attributes:
        token_N: token ids, int64 (torch, on the model's device).
        next_N: the true next token, −1 at the end of a sequence.
        sequence_N: index of the sequence in the corpus (numpy int64).
        position_N: position in the sequence, from 0 (numpy int64).
        role_N: index into `corpus.ROLES` (numpy int8).
        template_N: whether the token belongs to the chat template (numpy bool).
    """

    token_N: Any
    next_N: Any
    sequence_N: np.ndarray
    position_N: np.ndarray
    role_N: np.ndarray
    template_N: np.ndarray
    base: Side
    tuned: Side

    def __len__(self) -> int:
        return len(self.sequence_N)

    @cached_property
    def logprob_difference_NV(self) -> Any:
        """log p_tuned − log p_base, float32 [N, V]; free of the arbitrary offset of raw logits."""
        return self.tuned.logprobs() - self.base.logprobs()

    def difference(self, layer: int) -> Any:
        """δ = tuned − base at a layer, float32 [N, D]: subtracted after the cast, never in bf16."""
        return self.tuned.residual(layer).float() - self.base.residual(layer).float()


def pieces(blocks: Mapping[Any, TokenBlock], rows_together: int) -> Iterator[dict[Any, TokenBlock]]:
    """Cuts blocks of the same tokens alike; sides in common stay in common."""
    uses = _uses(blocks)
    for rows in _cuts(blocks, rows_together):
        shared: dict[int, Side] = {}
        yield {key: _cut(block, rows, shared, uses) for key, block in blocks.items()}


def tiles(blocks: Mapping[Any, TokenBlock], rows_together: int) -> Iterator[tuple[Any, TokenBlock]]:
    """As `pieces`, but block by block: what was derived of one is free when the next one's turn comes."""
    uses = _uses(blocks)
    for rows in _cuts(blocks, rows_together):
        shared: dict[int, Side] = {}
        for key, block in blocks.items():
            yield key, _cut(block, rows, shared, uses)


def _uses(blocks: Mapping[Any, TokenBlock]) -> Mapping[int, int]:
    return Counter(id(side) for block in blocks.values() for side in {block.base, block.tuned})


def _cuts(blocks: Mapping[Any, TokenBlock], rows_together: int) -> Iterator[slice]:
    n_tokens = max(map(len, blocks.values()), default=0)
    yield from (slice(start, start + rows_together) for start in range(0, n_tokens, rows_together))


def _cut(block: TokenBlock, rows: slice, shared: dict[int, Side], uses: Mapping[int, int]) -> TokenBlock:
    """Some rows of a block; sides that several blocks use are taken from `shared`, or kept there."""
    own: dict[int, Side] = {}
    for side in (block.base, block.tuned):
        place = shared if uses[id(side)] > 1 else own
        if id(side) not in place:
            place[id(side)] = side.cut(rows)
    sides = own | shared
    return TokenBlock(
        block.token_N[rows],
        block.next_N[rows],
        block.sequence_N[rows],
        block.position_N[rows],
        block.role_N[rows],
        block.template_N[rows],
        sides[id(block.base)],
        sides[id(block.tuned)],
    )
