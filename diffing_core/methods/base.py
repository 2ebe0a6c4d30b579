"""What a method declares, and what it is handed when it runs.

A method is one module of this package that ends with `METHOD = Method(...)`: a frozen declaration and
plain functions. There is no base class to inherit from and no list to be entered in.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, Protocol, runtime_checkable

import pyarrow as pa

from diffing_core.blocks import StreamContext, TokenBlock
from diffing_core.errors import UndeclaredNeedError
from diffing_core.figures import Figure
from diffing_core.findings import FINDINGS, Finding
from diffing_core.settings import Settings
from diffing_core.tables import TableSpec

Kind = Literal["stream", "fit", "live", "weights"]
Tables = Mapping[str, pa.Table]


class Need(Enum):
    """What a method reads. Each maps to one upstream asset, so lineage says what was really read."""

    RESIDUALS = "residuals"  # paired residual streams of the layers that its fold names
    LOGPROBS = "logprobs"  # paired next-token log-probabilities, blockwise
    ACTIVATIONS = "activations"  # the stored activation Parquet
    MODELS = "models"  # both models, for generation or patching
    WEIGHTS = "weights"  # the stream of parameter deltas
    PEERS = "peers"  # weights of the other registered finetunes of the same base
    FINETUNES = "finetunes"  # weights of those finetunes that settings name
    FOLDER = "folder"  # not read but kept: a folder of this result alone, for checkpoints and fitted weights


class Fold(Protocol):
    """The running state of a stream method: sees every block once, then writes its tables."""

    layers: tuple[int, ...]

    def update(self, block: TokenBlock) -> None:
        """Adds one block of tokens; keeps sums, counts and short lists, never the block, over which the next is written."""

    def finish(self) -> Tables:
        """The tables, by name."""


@runtime_checkable
class ResumableFold(Fold, Protocol):
    """A fold that has the first `stored_rows` rows from an interrupted pass, and can do without seeing them."""

    stored_rows: int

    def skip(self, n_rows: int) -> None:
        """Told, before the first block, of the next rows that will not be shown."""


class Inputs:
    """Gives a method exactly what it declared; anything else raises UndeclaredNeedError."""

    def __init__(self, method: "Method", suppliers: Mapping[Need, Callable[[], Any]]) -> None:
        self._method = method
        self._suppliers = suppliers

    def __getitem__(self, need: Need) -> Any:
        if need not in self._method.needs:
            declared = sorted(each.value for each in self._method.needs)
            raise UndeclaredNeedError(
                f"method {self._method.name!r} asked for {need.value!r} but declares {declared}; "
                "add it to `needs` so that lineage shows it"
            )
        return self._suppliers[need]()


@dataclass(frozen=True, kw_only=True)
class Method:
    """The declaration from which assets, checks, DDL, dbt sources, launch form and docs are derived.

    Attributes:
        name: equals the module's name.
        version: bumped by hand when numbers change; becomes Dagster's code version.
        kind: `stream` methods fold over the shared paired pass; the others `run` on their inputs.
        needs: what is read.
        settings: the knobs with their defaults.
        tables: typed tables it writes, beside `findings`.
        reference: paper or definition that the numbers follow.
        start: stream only; makes a fold for one pair and corpus.
        run: all other kinds; computes the tables.
        findings: what to show a person, best first, from the finished tables alone; None if the method
            prepares material for others and is itself no evidence.
        headline: a few numbers for the web UI, from the finished tables alone.
        figures: what of the tables a person wants to see drawn.
    """

    name: str
    version: str
    kind: Kind
    needs: frozenset[Need]
    settings: type[Settings]
    tables: tuple[TableSpec, ...]
    reference: str
    findings: Callable[[Tables, Any], Sequence[Finding]] | None
    headline: Callable[[Tables], Mapping[str, float | int | str]]
    start: Callable[[StreamContext, Any], Fold] | None = None
    run: Callable[[Inputs, Any], Tables] | None = None
    figures: tuple[Figure, ...] = ()

    def __post_init__(self) -> None:
        if (self.kind == "stream") == (self.start is None) or (self.kind == "stream") != (self.run is None):
            raise TypeError(f"method {self.name!r}: a stream method has `start`, every other kind has `run`")
        strange = [figure.title for figure in self.figures if figure.table not in self.tables]
        if strange:
            raise TypeError(f"method {self.name!r}: figure(s) {strange} draw a table that it does not write")

    @property
    def all_tables(self) -> tuple[TableSpec, ...]:
        """Its typed tables, and `findings` if it has any to show."""
        return self.tables if self.findings is None else (*self.tables, FINDINGS)
