"""Stored activations of a pair as material to fit on: read together, chosen by predicate, shuffled in bounded memory.

    stored = inputs[Need.ACTIVATIONS]                      # StoredPair: which layers, which corpora
    for rows in stored.at(5).of(Selection(first_position=4)).shuffled(2048, seed=0): …

Rows of base and tuned belong together by place and are checked by sequence, position and token; the two sets may
be cut into row groups differently. Row order on disk is longest sequences first, so whoever trains must shuffle:
chunks of all corpora are drawn in random order into a pool of bounded size, which is emptied in random order. Each
corpus's chunks are spread evenly over the epoch, so that every pool holds corpora in the proportion of their sizes.

Suffixes: N rows, D model width.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from diffing_core.activation_parts import ROWS_PER_GROUP
from diffing_core.activations import ActivationBlock, ActivationSet, ActivationStore
from diffing_core.corpus import ROLES, ProbeCorpus
from diffing_core.errors import NotComputableError, StorageError
from diffing_core.lazy import torch
from diffing_core.progress import track
from diffing_core.sampling import sampled
from diffing_core.settings import short_hash
from diffing_core.sums import Moments

POOL_ROWS, POOL_BYTES = 2**18, 2**31  # of a pool: whichever is less; bytes of both models' vectors
CAST_TOGETHER = 8192
TOKEN = ("sequence_N", "position_N", "token_N")
FACTS = (*TOKEN, "role_N", "template_N")
COLUMNS = ("corpus_N", *FACTS, "base_ND", "tuned_ND")


@dataclass(frozen=True)
class PairedRows:
    """N tokens with both models' vectors [N, D], in the dtypes in which they are stored; `corpus_N` counts the files."""

    corpus_N: np.ndarray
    sequence_N: np.ndarray
    position_N: np.ndarray
    token_N: np.ndarray
    role_N: np.ndarray
    template_N: np.ndarray
    base_ND: Any
    tuned_ND: Any

    def __len__(self) -> int:
        return len(self.token_N)

    @property
    def difference_ND(self) -> Any:
        """δ = tuned − base, float32: subtracted after the cast."""
        return self.tuned_ND.float() - self.base_ND.float()

    @property
    def document_N(self) -> np.ndarray:
        """A number for each row's document that no document of another corpus has."""
        return (self.corpus_N.astype(np.int64) << 32) + self.sequence_N

    def take(self, rows: np.ndarray | slice) -> Self:
        """The rows of these numbers, in their order; a stretch of them is not copied."""
        return replace(self, **{name: getattr(self, name)[rows] for name in COLUMNS})


@dataclass(frozen=True)
class Outliers:
    """Rows whose norm is above `most_M` in base or tuned (attention sinks): they would take a fit for themselves."""

    most_M: tuple[float, float]

    def are(self, rows: PairedRows) -> np.ndarray:
        """Which rows are, bool [N]."""
        base_N, tuned_N = _lengths(rows.base_ND), _lengths(rows.tuned_ND)  # also of rows that are not chosen: NaN may be there
        return (base_N > self.most_M[0]) | (tuned_N > self.most_M[1])


def norms(vector_ND: Any) -> np.ndarray:
    """Lengths, float32 [N].

    Raises:
        StorageError: some vector holds NaN, which would pass every bound and be in all that is fitted.
    """
    norm_N = _lengths(vector_ND)
    n_strange = int(np.isnan(norm_N).sum())
    if n_strange:
        raise StorageError(
            f"{n_strange} of {len(norm_N)} stored vectors hold NaN: the model gave no number there; probe it in another number format"
        )
    return norm_N


def _lengths(vector_ND: Any) -> np.ndarray:
    """Cast piece by piece, since a pool is as large as it may be."""
    return np.concatenate([part_ND.float().norm(dim=1).numpy() for part_ND in vector_ND.split(CAST_TOGETHER)])


@dataclass(frozen=True)
class Selection:
    """Which rows are read.

    Attributes:
        first_position: rows before it are left out, in every sequence for itself.
        roles: names of corpus.ROLES whose turns are read; None is all.
        template: whether tokens of the chat template are read too.
        part: rows to fit on, held-out rows, or all; whole sequences are held out, chosen by a hash.
        held_out_share: of the sequences.
        outliers: rows left out for their norms; None leaves out none.
    """

    first_position: int = 0
    roles: tuple[str, ...] | None = None
    template: bool = True
    part: Literal["all", "fit", "held_out"] = "all"
    held_out_share: float = 0.1
    outliers: Outliers | None = None

    def chooses(self, rows: PairedRows) -> np.ndarray:
        """Which rows are read, bool [N]."""
        kept_N = self.keeps(rows)
        return kept_N if self.outliers is None or not kept_N.any() else kept_N & ~self.outliers.are(rows)

    def keeps(self, rows: PairedRows | ActivationBlock) -> np.ndarray:
        """The same by what is known of each token, bool [N]; vectors are not looked at, so outliers are kept."""
        kept_N = rows.position_N >= self.first_position
        if self.roles is not None:
            kept_N &= np.isin(rows.role_N, [ROLES.index(role) for role in self.roles])
        if not self.template:
            kept_N &= ~rows.template_N
        if self.part != "all":
            held_out_N = sampled(rows.sequence_N, np.zeros_like(rows.sequence_N), self.held_out_share)
            kept_N &= held_out_N == (self.part == "held_out")
        return kept_N


@dataclass(frozen=True)
class PairedFile:
    """The stored sets of both models over one corpus, at one layer."""

    corpus: str
    base: ActivationSet
    tuned: ActivationSet

    @property
    def n_rows(self) -> int:
        """Tokens stored."""
        return self.base.n_rows

    @classmethod
    def open(cls, corpus: str, base: Path, tuned: Path) -> "PairedFile":
        """Opens both.

        Raises:
            StorageError: a set is incomplete, damaged or none of activations, or the two are of different size.
        """
        pair = cls(corpus, ActivationSet(base), ActivationSet(tuned))
        for what in ("n_rows", "d_model"):
            ours, theirs = getattr(pair.base, what), getattr(pair.tuned, what)
            if ours != theirs:
                raise StorageError(
                    f"{base} and {tuned} do not belong together: {what} is {ours} and {theirs}; delete both and "
                    "materialize `activations` again"
                )
        return pair

    def rows(self, start: int, stop: int, number: int) -> PairedRows:
        """Rows start … stop − 1 of both, marked with the file's number; StorageError where their tokens differ."""
        base, tuned = self.base.rows(start, stop), self.tuned.rows(start, stop)
        for name in TOKEN:
            differs = np.flatnonzero(getattr(base, name) != getattr(tuned, name))
            if len(differs):
                raise StorageError(
                    f"row {start + differs[0]} of {self.base.folder} and of {self.tuned.folder} are different tokens "
                    f"({name[:-2]}); delete both and materialize `activations` again"
                )
        facts = {name: getattr(base, name) for name in FACTS}
        corpus_N = np.full(len(base.token_N), number, np.int16)
        return PairedRows(corpus_N, **facts, base_ND=base.vector_ND, tuned_ND=tuned.vector_ND)


@dataclass(frozen=True)
class PairedActivations:
    """The chosen rows of a pair at one layer, over all its corpora."""

    files: Sequence[PairedFile]
    selection: Selection = field(default_factory=Selection)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.files[0].base.d_model

    @property
    def fingerprint(self) -> str:
        """16 hex digits over the bytes stored for both models, whatever is selected; from the footers, no vector is read.

        The identity of a result holds revisions and corpora. Activations written anew can differ by rounding under the
        same identity, so whoever keeps what was fitted on them keeps this beside it.
        """
        return short_hash([[file.base.fingerprint, file.tuned.fingerprint] for file in self.files], 16)

    @property
    def pool_rows(self) -> int:
        """Rows of a pool at most: POOL_ROWS, or fewer where so many would exceed POOL_BYTES."""
        sizes = (getattr(torch, each.dtype).itemsize for each in (self.files[0].base, self.files[0].tuned))
        return max(1, min(POOL_ROWS, POOL_BYTES // (self.d_model * sum(sizes))))

    def count(self) -> int:
        """How many rows are chosen, outliers among them; read from their facts, no vector is."""
        return sum(int(self.selection.keeps(facts).sum()) for file in self.files for facts in file.base.facts())

    def of(self, selection: Selection) -> "PairedActivations":
        """Other rows of the same files."""
        return PairedActivations(self.files, selection)

    def outliers(self, ratio: float) -> Outliers | None:
        """Rows above `ratio` times the median norm of a model, taken over one pool of these rows; None without rows.

        Raises:
            StorageError: some of them hold NaN.
        """
        rows = next(self.shuffled(self.pool_rows, seed=0), None)
        if rows is None:
            return None
        base, tuned = (ratio * float(np.median(norms(each_ND))) for each_ND in (rows.base_ND, rows.tuned_ND))
        return Outliers((base, tuned))

    def without(self, outliers: Outliers | None) -> "PairedActivations":
        """These rows less the outliers."""
        return self.of(replace(self.selection, outliers=outliers))

    def blocks(self) -> Iterator[PairedRows]:
        """All chosen rows in stored order, at most ROWS_PER_GROUP at a time, none empty."""
        for number, file in enumerate(self.files):
            for start in range(0, file.n_rows, ROWS_PER_GROUP):
                yield from self._chosen(number, start)

    def watched(self, what: str) -> Iterator[PairedRows]:
        """`blocks`, with the progress of reading them shown under that name."""
        left = self.count()
        with track(left, "tokens", what) as advance:
            for rows in self.blocks():
                yield rows
                advance(len(rows))
                left -= len(rows)
            advance(left)  # the outliers, which no block holds

    def shuffled(
        self, batch_rows: int, *, seed: int, epochs: int | None = 1, pool_rows: int = POOL_ROWS
    ) -> Iterator[PairedRows]:
        """Batches of `batch_rows` rows in random order, each row once an epoch; endless if `epochs` is None.

        A pool has `pool_rows` rows, `self.pool_rows` at most, and one batch at least. What does not fill a batch begins
        the next one; only the very last may be smaller. Memory: two pools while one is put together from its chunks,
        then one, and three batches beside it.
        """
        draw = np.random.default_rng(seed)
        rest: list[PairedRows] = []
        for parts in self._pools(draw, max(min(pool_rows, self.pool_rows), batch_rows), epochs):
            pool = joined(parts)
            parts.clear()
            order_N = draw.permutation(len(pool))
            start, stop = 0, batch_rows - sum(map(len, rest))
            while stop <= len(pool):
                batch = joined([*rest, pool.take(order_N[start:stop])])
                rest = []
                yield batch
                start, stop = stop, stop + batch_rows
            rest += [pool.take(order_N[start:])] if start < len(pool) else []
            del pool  # before the next one is read
        yield from [joined(rest)] if rest else []

    def base_norm(self) -> float:
        """Mean ‖h_base‖ of the first chosen rows of every corpus that has any: the unit of steering strengths; 0 without rows."""
        firsts = (
            next((rows for start in range(0, file.n_rows, ROWS_PER_GROUP) for rows in self._chosen(number, start)), None)
            for number, file in enumerate(self.files)
        )
        norm_N = np.concatenate([np.zeros(0), *(norms(rows.base_ND) for rows in firsts if rows is not None)])
        return float(norm_N.mean()) if len(norm_N) else 0.0

    def moments(self) -> dict[str, Moments]:
        """Mean and variance per dimension of base, tuned and difference, in float64."""
        found = {name: Moments(self.d_model) for name in ("base", "tuned", "difference")}
        for rows in self.blocks():
            for name, moments in found.items():
                moments.add(getattr(rows, f"{name}_ND").float().numpy())
        return found

    def _pools(self, draw: np.random.Generator, pool_rows: int, epochs: int | None) -> Iterator[list[PairedRows]]:
        """Chosen rows of randomly ordered chunks, gathered until `pool_rows` are reached or an epoch ends; to be emptied."""
        for _ in itertools.count() if epochs is None else range(epochs):
            pool: list[PairedRows] = []
            for number, start in self._chunk_order(draw):
                pool += self._chosen(number, start)
                if sum(map(len, pool)) >= pool_rows:
                    yield pool
                    pool = []
            if pool:
                yield pool

    def _chunk_order(self, draw: np.random.Generator) -> list[tuple[int, int]]:
        """Every chunk once; a corpus's chunks lie evenly spread, so that each stretch holds all in proportion."""
        placed: list[tuple[float, int, int]] = []
        for number, file in enumerate(self.files):
            starts = draw.permutation(np.arange(0, file.n_rows, ROWS_PER_GROUP))
            places = (np.arange(len(starts)) + draw.random()) / max(len(starts), 1)
            placed += zip(places.tolist(), [number] * len(starts), starts.tolist(), strict=True)
        return [(number, start) for _, number, start in sorted(placed)]

    def _chosen(self, number: int, start: int) -> list[PairedRows]:
        """The chosen rows of one chunk: one block, or none."""
        file = self.files[number]
        rows = file.rows(start, min(start + ROWS_PER_GROUP, file.n_rows), number)
        kept_N = self.selection.chooses(rows)
        if kept_N.all():
            return [rows]
        return [rows.take(np.flatnonzero(kept_N))] if kept_N.any() else []


@dataclass(frozen=True)
class StoredPair:
    """What is stored of a pair: the corpora it was probed with, and the layers at which both models' vectors are there.

    `base` and `tuned` are (revision, dtype) of the two model states.
    """

    store: ActivationStore
    base: tuple[str, Any]
    tuned: tuple[str, Any]
    corpora: tuple[ProbeCorpus, ...]

    @property
    def name(self) -> str:
        """The corpora's names."""
        return "+".join(corpus.name for corpus in self.corpora)

    @property
    def content_hash(self) -> str:
        """Of all corpora, in their order."""
        return short_hash([corpus.content_hash for corpus in self.corpora])

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers at which both models' vectors are stored for every corpus.

        Raises:
            NotComputableError: there are none.
        """
        files = [(*side, corpus.content_hash) for side in (self.base, self.tuned) for corpus in self.corpora]
        found = set.intersection(*(self.store.layers(revision, corpus, dtype) for revision, dtype, corpus in files))
        if not found:
            raise NotComputableError(
                f"no layer is stored for both models on {self.name}; materialize `activations` of this pair first"
            )
        return tuple(sorted(found))

    def at(self, layer: int) -> PairedActivations:
        """All rows at one of `layers`."""
        return PairedActivations([PairedFile.open(corpus.name, *self._folders(corpus, layer)) for corpus in self.corpora])

    def _folders(self, corpus: ProbeCorpus, layer: int) -> tuple[Path, Path]:
        base, tuned = (
            self.store.folder(revision, corpus.content_hash, layer, dtype) for revision, dtype in (self.base, self.tuned)
        )
        return base, tuned


def joined(parts: Sequence[PairedRows]) -> PairedRows:
    """One block of several, in their order."""
    if len(parts) == 1:
        return parts[0]
    columns = {name: [getattr(part, name) for part in parts] for name in COLUMNS}
    return PairedRows(**{name: torch.cat(each) if name.endswith("D") else np.concatenate(each) for name, each in columns.items()})
