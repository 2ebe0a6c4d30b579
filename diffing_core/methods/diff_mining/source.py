"""Where d comes from: the predictions of both models at the positions that are counted.

    logits          the models' own next-token predictions
    logit_lens      final norm and head of the residual stream after an earlier block
    patchscope_lens the residual of a probe token, put after the same block in place of the last token of a
                    prompt that repeats words; read is what the model says there

    d = log p_tuned − log p_base              log_prob
    d = (z_tuned − z_base) − its mean over V  centred; the same for logits z and for log-probabilities
    d = z_tuned − z_base                      raw: logits, each with an offset that means nothing

References: nostalgebraist 2020 (logit lens); Ghandeharioun et al. 2024 (patchscopes, arXiv 2401.06102).
Suffixes: N tokens of a block, R those read, D width, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from diffing_core.blocks import StreamContext, TokenBlock
from diffing_core.methods.diff_mining.patchscope import PatchedPrompt
from diffing_core.methods.diff_mining.settings import DiffMiningSettings
from diffing_core.sampling import sampled


@dataclass(frozen=True)
class Reading:
    """What both models predict at R positions: d, float32 [R, V], and probabilities summed over the positions, [V]."""

    sequence_R: np.ndarray
    position_R: np.ndarray
    base_probability_V: Any
    tuned_probability_V: Any
    difference_RV: Any


class Source:
    """Reads the counted rows of a block."""

    def __init__(self, context: StreamContext, settings: DiffMiningSettings, n_counted: int) -> None:
        """`n_counted`: positions of the corpus that will be counted."""
        self._context = context
        self._difference = settings.difference
        self._own = settings.source == "logits"
        self.layers = () if self._own else context.pick_layers((settings.lens_layer,))
        self._share = 1.0
        self._prompt = None
        if settings.source == "patchscope_lens":
            self._share = min(1.0, settings.patchscope_tokens / max(n_counted, 1))
            self._prompt = PatchedPrompt(context.tokenizer, settings.patchscope_prompt, *self.layers)

    def read(self, block: TokenBlock, counted_N: np.ndarray) -> Reading | None:
        """The predictions after the counted positions, if there are any; the patchscope reads a sample of these."""
        counted_N = counted_N & sampled(self._context.corpus.key_S[block.sequence_N], block.position_N, self._share)
        if not counted_N.any():
            return None
        if self._own and self._difference == "log_prob" and counted_N.all():
            return Reading(
                block.sequence_N, block.position_N, block.base.summed_probability_V, block.tuned.summed_probability_V,
                block.logprob_difference_NV,
            )  # fmt: skip
        rows_R = np.flatnonzero(counted_N)
        scores = [self._scores(block, side, rows_R) for side in ("base", "tuned")]
        normalised = self._own and self._difference != "raw"
        logprobs = scores if normalised else [score_RV.log_softmax(-1) for score_RV in scores]
        base_RV, tuned_RV = scores if self._difference == "raw" else logprobs
        difference_RV = tuned_RV - base_RV
        if self._difference == "centred":
            difference_RV -= difference_RV.mean(1, keepdim=True)
        base_V, tuned_V = (logprob_RV.exp().sum(0) for logprob_RV in logprobs)
        return Reading(block.sequence_N[rows_R], block.position_N[rows_R], base_V, tuned_V, difference_RV)

    def _scores(self, block: TokenBlock, name: str, rows_R: np.ndarray) -> Any:
        """Logits, or for the models' own predictions the log-probabilities that all methods share, float32 [R, V]."""
        side, subject = getattr(block, name), getattr(self._context, name)
        if self._own:
            return side.logits()[rows_R].float() if self._difference == "raw" else side.logprobs()[rows_R]
        residual_RD = side.residual(*self.layers)[rows_R]
        logits_RV = self._prompt.logits(subject, residual_RD) if self._prompt else subject.readout(residual_RD)
        return logits_RV[:, : self._context.vocab_size].float()
