"""What a fit method needs to show what it found: tokens of a direction, and the texts where a latent is largest.

The corpora of a pair are read as one: sequence numbers count through them in their order.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from diffing_core.activation_pairs import PairedRows, StoredPair
from diffing_core.blocks import Side, StreamContext, TokenBlock
from diffing_core.capture import capture_residuals
from diffing_core.corpus import ProbeCorpus, ProbeSequence, TokenBatch
from diffing_core.direction_lens import SAMPLED_TOKENS, DirectionLens
from diffing_core.errors import NotComputableError
from diffing_core.lazy import torch
from diffing_core.models import ModelPair
from diffing_core.sampling import position_hash, sampled

TOKENS_PER_BATCH = 1024


class FitReading:
    """The pair's vocabulary, corpora and lens, for methods that read stored activations."""

    def __init__(self, pair: ModelPair, stored: StoredPair, min_probability: float = 1e-8) -> None:
        self._min_probability = min_probability
        self._stored = stored
        sequences = [sequence for corpus in stored.corpora for sequence in corpus.sequences]
        whole = ProbeCorpus(stored.name, tuple(sequences), len(sequences), skip_first_tokens=stored.corpora[0].skip_first_tokens)
        self._first_C = np.cumsum([0, *(len(corpus.sequences) for corpus in stored.corpora)])
        self.context = StreamContext(
            base=pair.base,
            tuned=pair.tuned,
            tokenizer=pair.tokenizer,
            corpus=whole,
            n_layers=pair.base.n_layers,
            d_model=pair.base.d_model,
            vocab_size=pair.common_vocab,
        )

    def layers(self, wanted: Sequence[int | float] | None) -> tuple[int, ...]:
        """Those of the wanted layers, None being all that are stored.

        Raises:
            NotComputableError: one of them is not stored.
        """
        stored = self._stored.layers
        if wanted is None:
            return stored
        picked = self.context.pick_layers(wanted)
        missing = sorted(set(picked) - set(stored))
        if missing:
            raise NotComputableError(
                f"layer(s) {missing} of {self._stored.name} are not stored, only {list(stored)}; materialize `activations` "
                "with these layers, or choose among the stored ones"
            )
        return picked

    def sequence_N(self, rows: PairedRows) -> np.ndarray:
        """Number of each row's sequence among all corpora's."""
        return self._first_C[rows.corpus_N] + rows.sequence_N

    def held_out_S(self, share: float) -> np.ndarray:
        """Which sequences of all corpora are held out, bool [S]: those that `Selection` holds out at this share."""
        sizes = [len(corpus.sequences) for corpus in self._stored.corpora]
        return np.concatenate([sampled(np.arange(size), np.zeros(size, np.int64), share) for size in sizes])

    @cached_property
    def lens(self) -> DirectionLens:
        """Reads directions through norm and head; knows which tokens are in use, from corpora and a few forwards."""
        lens = DirectionLens(self.context, self._min_probability, share=1.0)
        some = replace(self.context.corpus, sequences=self._some_sequences())
        with torch.inference_mode():
            for batch in some.batches(TOKENS_PER_BATCH):
                lens.update(self._block(batch))
        return lens

    def _some_sequences(self) -> tuple[ProbeSequence, ...]:
        """Whole sequences from all over the corpora, until they hold SAMPLED_TOKENS."""
        every = self.context.corpus.sequences
        order = np.argsort(position_hash(np.arange(len(every)), np.zeros(len(every), np.int64), 0))
        n_tokens = np.cumsum([len(every[index]) for index in order])
        return tuple(every[index] for index in order[: np.searchsorted(n_tokens, SAMPLED_TOKENS) + 1])

    def _block(self, batch: TokenBatch) -> TokenBlock:
        """The last layer's states of both models; of the other facts only place and token."""
        last = self.context.n_layers - 1
        base, tuned = (
            Side(capture_residuals(side, batch, (last,)), last, side.readout, self.context.vocab_size)
            for side in (self.context.base, self.context.tuned)
        )
        row_N, position_N = np.nonzero(batch.mask_BT)
        token_N = torch.from_numpy(batch.token_BT[row_N, position_N])
        unknown_N = np.zeros(len(row_N), np.int8)
        return TokenBlock(token_N, token_N, np.asarray(batch.sequences)[row_N], position_N, unknown_N, unknown_N > 0, base, tuned)
