"""Residual vectors of both models as Parquet, with exact per-dimension statistics.

Writes the vectors themselves to the activation store (see `diffing_core.activations`) and, as its table,
what is there: mean and variance per dimension in float64 whatever the model's dtype. What is already stored,
whole sets or parts of one that an interrupted pass left, is not written again; and where no other method
wants the pass, it begins after what all sets have.
"""

from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from diffing_core.activations import ActivationSet
from diffing_core.blocks import StreamContext, TokenBlock
from diffing_core.errors import NotComputableError
from diffing_core.methods.base import Method, Need, Tables
from diffing_core.settings import Settings
from diffing_core.tables import Column, TableSpec


class ActivationsSettings(Settings):
    """Knobs of `activations`."""

    layers: tuple[int | float, ...] | None = Field(
        (0.5, 0.75, 1.0), description="Blocks to store; a fraction r means floor(r · (L − 1)); none means all."
    )


SETS = TableSpec(
    "activation_sets",
    "Stored activations: where they are and their statistics.",
    ("side", "layer"),
    (
        Column("side", "string", "base or tuned.", role="key"),
        Column("layer", "int32", "Block whose output is stored, from 0.", role="key"),
        Column("folder", "string", "Folder of Parquet parts, relative to the activation store."),
        Column("dtype", "string", "Number format of the stored values."),
        Column("d_model", "int32", "Width of the residual stream."),
        Column("n_tokens", "int64", "Rows.", role="count"),
        Column("n_bytes", "int64", "Size on disk.", "bytes", role="count"),
        Column("mean", "list<float64>", "Mean of each dimension."),
        Column("variance", "list<float64>", "Population variance of each dimension."),
        Column("mean_norm", "float64", "Norm of the mean vector."),
    ),
)


class ActivationsFold:
    """One writer per side and layer that is not stored yet."""

    def __init__(self, context: StreamContext, settings: ActivationsSettings) -> None:
        if context.store is None:
            raise NotComputableError("activations are written to disk: give paired_pass a `store` folder")
        if not (context.base.revision and context.tuned.revision):
            raise NotComputableError("activations are keyed by model revision; load the pair from the registry")
        self.layers = context.pick_layers(settings.layers)
        self._context = context
        self._sets = [(side, layer) for side in ("base", "tuned") for layer in self.layers]
        n_rows = context.corpus.n_tokens
        claimed = {
            (side, layer): context.store.claim(self._folder(side, layer), context.d_model, self._subject(side).dtype, n_rows)
            for side, layer in self._sets
        }
        self._writers = {place: writer for place, writer in claimed.items() if writer is not None}
        self.stored_rows = min((writer.stored_rows for writer in self._writers.values()), default=n_rows)

    def skip(self, n_rows: int) -> None:
        """Passes over rows that every set has."""
        for writer in self._writers.values():
            writer.skip(n_rows)

    def update(self, block: TokenBlock) -> None:
        """Writes N rows per side and layer."""
        for (side, layer), writer in self._writers.items():
            writer.add(block, getattr(block, side).residual(layer))

    def finish(self) -> Tables:
        """Makes sure that all is there; one row per side and layer."""
        for writer in self._writers.values():
            writer.close()
        rows = [self._row(side, layer) for side, layer in self._sets]
        return {SETS.name: SETS.table({name: [row[name] for row in rows] for name in SETS.schema.names})}

    def _row(self, side: str, layer: int) -> dict[str, Any]:
        folder = self._folder(side, layer)
        stored = ActivationSet(folder)
        moments = stored.moments()
        return {
            "side": side,
            "layer": layer,
            "folder": str(folder.relative_to(self._context.store.root)),
            "dtype": stored.dtype,
            "d_model": stored.d_model,
            "n_tokens": moments.count,
            "n_bytes": stored.n_bytes,
            "mean": moments.mean_D,
            "variance": moments.variance_D(),
            "mean_norm": float(np.linalg.norm(moments.mean_D)),
        }

    def _subject(self, side: str) -> Any:
        return getattr(self._context, side)

    def _folder(self, side: str, layer: int) -> Path:
        subject = self._subject(side)
        return self._context.store.folder(subject.revision, self._context.corpus.content_hash, layer, subject.dtype)


def headline(tables: Tables) -> dict[str, float | int | str]:
    """Rows and size."""
    sets = tables[SETS.name]
    return {"n_sets": len(sets), "n_tokens": max(sets["n_tokens"].to_pylist()), "n_bytes": sum(sets["n_bytes"].to_pylist())}


METHOD = Method(
    name="activations",
    version="2",
    kind="stream",
    needs=frozenset({Need.RESIDUALS}),
    settings=ActivationsSettings,
    tables=(SETS,),
    reference="residual stream after each block; Elhage et al. 2021",
    findings=None,
    headline=headline,
    start=ActivationsFold,
)
