"""Which passages finetuning made likelier: the log-likelihood ratio of windows of the probe texts.

    ratio(a, n) = Σ_{i = a … a+n−1} log p_tuned(x_i | x_<i) − log p_base(x_i | x_<i)        nats

by the models' own predictions, whatever source is mined. Windows slide by `window_step`; the last one ends
with the sequence. Of each sequence only the windows of largest and of smallest ratio compete, so that no
passage is listed many times over.

Suffixes: N tokens of a block, T positions of a sequence, A starts of windows.
"""

import numpy as np
import pyarrow as pa

from diffing_core.blocks import StreamContext, TokenBlock
from diffing_core.corpus import ROLES, ProbeSequence
from diffing_core.methods.diff_mining.schema import WINDOWS
from diffing_core.methods.diff_mining.settings import DiffMiningSettings

Window = tuple[float, int, int, int]  # −|ratio|, sequence, position of the first token, tokens


class LikelihoodWindows:
    """A short list in each direction, and the ratios of the sequences that are being read."""

    def __init__(self, context: StreamContext, settings: DiffMiningSettings) -> None:
        self._context = context
        self._settings = settings
        self._open: dict[int, np.ndarray] = {}
        self._best: dict[int, list[Window]] = {1: [], -1: []}

    def add(self, block: TokenBlock, ended: list[int]) -> None:
        """Adds N tokens; `ended` are the sequences whose last token is among them."""
        next_N = block.next_N.clamp(min=0)
        ratio_N = block.logprob_difference_NV.gather(1, next_N[:, None])[:, 0].cpu().double().numpy()
        bounds = np.flatnonzero(np.diff(block.sequence_N)) + 1
        for rows in np.split(np.arange(len(block)), bounds):
            sequence = int(block.sequence_N[rows[0]])
            if sequence not in self._open:
                self._open[sequence] = np.zeros(len(self._context.corpus.sequences[sequence]))
            self._open[sequence][block.position_N[rows]] = ratio_N[rows]
        for sequence in ended:
            self._close(sequence, self._open.pop(sequence))

    def table(self) -> pa.Table:
        """The listed windows, likeliest first."""
        for best in self._best.values():
            self._shorten(best)
        rows = [(-sign * value, *where) for sign, best in self._best.items() for value, *where in best]
        rows.sort(key=lambda row: -row[0])
        ratios, sequences, positions, lengths = zip(*rows, strict=True) if rows else ((),) * 4
        return WINDOWS.table(
            {
                "sequence": sequences,
                "position": positions,
                "n_tokens": lengths,
                "log_likelihood_ratio": ratios,
                "speaker": [ROLES[self._sequence(row[1]).role_T[row[2]]] for row in rows],
                "is_template": [bool(self._sequence(row[1]).template_T[row[2]]) for row in rows],
                "text": [self._text(*row[1:]) for row in rows],
            }
        )

    def _close(self, sequence: int, ratio_T: np.ndarray) -> None:
        first = int(self._context.corpus.first_seen_S[sequence])
        ratio_T = ratio_T[first:-1]  # nothing follows the last token
        n = min(self._settings.window_tokens, len(ratio_T))
        if not n:
            return
        last = len(ratio_T) - n
        start_A = np.append(np.arange(0, last, self._settings.window_step), last)
        total_T = np.append(0, ratio_T.cumsum())
        ratio_A = total_T[start_A + n] - total_T[start_A]
        for sign, best in self._best.items():
            place = (sign * ratio_A).argmax()
            if sign * ratio_A[place] > 0:
                best.append((-abs(float(ratio_A[place])), sequence, first + int(start_A[place]) + 1, n))
                if len(best) > 2 * self._settings.windows:
                    self._shorten(best)

    def _shorten(self, best: list[Window]) -> None:
        best.sort()
        del best[self._settings.windows :]

    def _text(self, sequence: int, position: int, n_tokens: int) -> str:
        token_T = self._sequence(sequence).token_T[position : position + n_tokens]
        return "".join(self._context.token_texts(token_T))

    def _sequence(self, index: int) -> ProbeSequence:
        return self._context.corpus.sequences[index]
