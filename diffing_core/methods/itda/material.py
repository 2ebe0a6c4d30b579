"""The tokens that dictionaries are built from and measured on, with both models' vectors, at one layer.

Which tokens is decided by a hash of their place, so layers and finetunes are compared on the same ones, but for outliers,
which are each layer's and each pair's own.
A dictionary sees single tokens from all over the texts; whole texts are held out.

Suffixes: N tokens, D width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffing_core.activation_pairs import PairedActivations, PairedRows, StoredPair, joined
from diffing_core.activations import ActivationBlock
from diffing_core.errors import NotComputableError
from diffing_core.fit_reading import FitReading
from diffing_core.itda_dictionary import Staged, usable
from diffing_core.lazy import torch
from diffing_core.methods.itda.settings import ItdaSettings
from diffing_core.sampling import position_hash
from diffing_core.sums import float64_device

ORDER = 1  # seed of the hash by which tokens are chosen


@dataclass(frozen=True)
class Material:
    """N tokens; `sequence_N` counts texts through all corpora. Vectors are float32.

    `n_outliers`: rows of the whole layer that were left out for their norms before any was chosen.
    """

    rows: PairedRows
    sequence_N: np.ndarray
    n_left_out: int
    n_outliers: int

    def __len__(self) -> int:
        return len(self.sequence_N)

    @property
    def base_ND(self) -> Any:
        """The base's vectors."""
        return self.rows.base_ND

    @property
    def tuned_ND(self) -> Any:
        """The tuned model's."""
        return self.rows.tuned_ND

    @property
    def place_N(self) -> np.ndarray:
        """One number per token, the same at every layer."""
        return places(self.sequence_N, self.rows.position_N)

    def documents_of(self, token_I: np.ndarray) -> np.ndarray:
        """Texts that these tokens are from, each once."""
        return np.unique(self.sequence_N[token_I])


def places(sequence_N: np.ndarray, position_N: np.ndarray) -> np.ndarray:
    """One number for each token of a text, int64; the two are broadcast."""
    return sequence_N.astype(np.int64) << 32 | position_N.astype(np.int64)


def turned_ID(found: Staged, material: Material) -> Any:
    """What tuning did to each atom's token, in units of the vector that the atom is: (h_tuned − h_base) / ‖h‖, [I, D].

    An atom is its token's vector in the base, or in the tuned model if that added it.
    """
    base_ID, tuned_ID = (vector_ND[found.whole.token_I] for vector_ND in (material.base_ND, material.tuned_ND))
    own_I1 = torch.cat([base_ID[: found.n_base], tuned_ID[found.n_base :]]).norm(dim=1, keepdim=True)
    return (tuned_ID - base_ID) / own_I1


class Chosen:
    """Which tokens of a stored pair are read."""

    def __init__(self, stored: StoredPair, reading: FitReading, special: Sequence[int], settings: ItdaSettings) -> None:
        """Raises NotComputableError if no text is held out."""
        self._reading, self._special, self._settings = reading, special, settings
        share = settings.held_out_share
        self._is_held_out_S = reading.held_out_S(share)
        documents = np.flatnonzero(self._is_held_out_S)
        if not len(documents):
            raise NotComputableError(
                f"none of the {len(self._is_held_out_S)} texts of {stored.name} is held out at held_out_share={share}; raise it, "
                "or probe with more texts"
            )
        in_order = documents[np.argsort(position_hash(documents, np.zeros_like(documents), ORDER))]
        n_read = {document: self._n_read(document) for document in in_order}
        self._held_out = _until([document for document in in_order if n_read[document]], n_read, settings.held_out_tokens)

    def read(self, at: PairedActivations) -> tuple[Material, Material]:
        """At most `max_tokens` single tokens, in hash order; and whole held-out texts, in stored order. One reading."""
        wanted, share = self._settings.max_tokens, self._settings.held_out_share
        every = self._settings.rows(at, share)
        n_outliers = n_rows = every.count()
        if not n_rows:
            raise self._nothing("stored")
        below = min(1.0, 1.5 * wanted / (n_rows * (1 - share)) + 50 / n_rows) * (2**64 - 1)  # more than are wanted: the hash is no count
        fit, held_out = [], []
        for rows in every.blocks():
            n_outliers -= len(rows)
            sequence_N = self._reading.sequence_N(rows)
            to_fit_N = ~self._is_held_out_S[sequence_N] & (self._hash_N(rows) <= below)
            fit.append(rows.take(np.flatnonzero(to_fit_N)))
            held_out.append(rows.take(np.flatnonzero(np.isin(sequence_N, self._held_out))))
        tokens = self._some(fit, "fitted")
        first = np.argsort(self._hash_N(tokens), kind="stable")[:wanted]
        chosen = tokens.take(first), self._some(held_out, "held-out")
        fitted, encoded = (self._material(each, n_outliers) for each in chosen)
        return fitted, encoded

    def held_out_documents(self, n_tokens: int) -> list[int]:
        """Some of the held-out texts, about as many tokens of them; one at least."""
        lengths = {document: len(self._reading.context.corpus.sequences[document]) for document in self._held_out}
        return _until(self._held_out, lengths, n_tokens)

    def _n_read(self, document: int) -> int:
        """Tokens of a text that the settings choose, outliers among them."""
        corpus = self._reading.context.corpus
        sequence, seen = corpus.sequences[document], slice(corpus.first_seen_S[document], None)
        position_N = np.arange(len(sequence))[seen]
        facts = ActivationBlock(
            np.full_like(position_N, document), position_N, sequence.token_T[seen], sequence.role_T[seen], sequence.template_T[seen], None
        )
        return int(self._settings.selection().keeps(facts).sum())

    def _some(self, parts: Sequence[PairedRows], what: str) -> PairedRows:
        if not sum(map(len, parts)):
            raise self._nothing(what)
        return joined(parts)

    def _nothing(self, what: str) -> NotComputableError:
        settings = self._settings
        return NotComputableError(
            f"no token of the {what} texts is left from position {settings.first_position} on with roles {settings.roles or 'all'} and "
            f"template={settings.template}; choose more of them, or probe with more or longer texts"
        )

    def _hash_N(self, rows: PairedRows) -> np.ndarray:
        return position_hash(self._reading.sequence_N(rows), rows.position_N, ORDER)

    def _material(self, rows: PairedRows, n_outliers: int) -> Material:
        norms_SN = np.stack([rows.base_ND.float().norm(dim=1).numpy(), rows.tuned_ND.float().norm(dim=1).numpy()])
        kept = np.flatnonzero(usable(rows.token_N, norms_SN, self._special))
        if not len(kept):
            raise NotComputableError(f"all {len(rows)} tokens are special or zero; probe with text")
        n_left_out, rows = len(rows) - len(kept), rows.take(kept)
        device = float64_device(self._reading.context.tuned.device)
        rows = PairedRows(**vars(rows) | {side: getattr(rows, side).float().to(device) for side in ("base_ND", "tuned_ND")})
        return Material(rows, self._reading.sequence_N(rows), n_left_out, n_outliers)


def _until(documents: Sequence[int], n_tokens_of: Mapping[int, int], n_tokens: int) -> list[int]:
    """The first documents whose tokens do not exceed a number; one at least."""
    lengths = [n_tokens_of[document] for document in documents]
    return [int(each) for each in documents[: max(1, int(np.searchsorted(np.cumsum(lengths), n_tokens, side="right")))]]
