"""Where atoms come from: tokens and snippets of probe texts as text. They are other people's words: untrusted."""

from functools import cache

import numpy as np

from diffing_core.fit_reading import FitReading
from diffing_core.methods.itda.material import Material


class Sources:
    """Texts around tokens of the corpora."""

    def __init__(self, reading: FitReading, context_tokens: int) -> None:
        self._reading, self._around = reading, context_tokens
        self._texts_of = cache(self._texts)

    def tokens(self, material: Material, token_I: np.ndarray) -> list[str]:
        """Each token decoded on its own."""
        return self._reading.context.token_texts(material.rows.token_N[token_I].tolist())

    def snippet(self, material: Material, token: int) -> str:
        """The token between « and », with its neighbours in the text."""
        texts, position = self._texts_of(int(material.sequence_N[token])), int(material.rows.position_N[token])
        before = texts[max(0, position - self._around) : position]
        return "".join([*before, "«", texts[position], "»", *texts[position + 1 : position + 1 + self._around]])

    def snippets(self, material: Material, token_I: np.ndarray) -> list[str]:
        """Of several tokens."""
        return [self.snippet(material, int(token)) for token in token_I]

    def _texts(self, sequence: int) -> list[str]:
        return self._reading.context.token_texts(self._reading.context.corpus.sequences[sequence].token_T.tolist())
