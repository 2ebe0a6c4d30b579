"""Residual vectors of both models as Parquet, with exact per-dimension statistics.

Writes the vectors themselves to the activation store (see `diffing_core.activations`) and, as its table,
what is there: mean and variance per dimension in float64 whatever the model's dtype. A base state that
is already stored is not written again.
"""

from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from diffing_core.activations import name_of
from diffing_core.blocks import StreamContext, TokenBlock
from diffing_core.errors import NotComputableError
from diffing_core.methods.base import Method, Need, Tables
from diffing_core.settings import Settings
from diffing_core.sums import Moments
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
        Column("file", "string", "Parquet file, relative to the activation store."),
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
    """One writer per side and layer that is not stored yet; moments of every side and layer."""

    def __init__(self, context: StreamContext, settings: ActivationsSettings) -> None:
        if context.store is None:
            raise NotComputableError("activations are written to disk: give paired_pass a `store` folder")
        if not (context.base.revision and context.tuned.revision):
            raise NotComputableError("activations are keyed by model revision; load the pair from the registry")
        self.layers = context.pick_layers(settings.layers)
        self._context = context
        self._moments = {(side, layer): Moments(context.d_model) for side in ("base", "tuned") for layer in self.layers}
        self._writers = {
            (side, layer): context.store.claim(self._file(side, layer), context.d_model, self._subject(side).dtype)
            for side, layer in self._moments
        }

    def update(self, block: TokenBlock) -> None:
        """Writes N rows per side and layer."""
        for (side, layer), moments in self._moments.items():
            vector_ND = getattr(block, side).residual(layer)
            moments.add(vector_ND.float().cpu().numpy())
            writer = self._writers[side, layer]
            if writer is not None:
                writer.add(block, vector_ND)

    def finish(self) -> Tables:
        """Closes the files; one row per side and layer."""
        for writer in filter(None, self._writers.values()):
            writer.close()
        rows = [self._row(side, layer) for side, layer in self._moments]
        return {SETS.name: SETS.table({name: [row[name] for row in rows] for name in SETS.schema.names})}

    def _row(self, side: str, layer: int) -> dict[str, Any]:
        moments, file = self._moments[side, layer], self._file(side, layer)
        return {
            "side": side,
            "layer": layer,
            "file": str(file.relative_to(self._context.store.root)),
            "dtype": name_of(self._subject(side).dtype),
            "d_model": self._context.d_model,
            "n_tokens": moments.count,
            "n_bytes": file.stat().st_size,
            "mean": moments.mean_D,
            "variance": moments.variance_D(),
            "mean_norm": float(np.linalg.norm(moments.mean_D)),
        }

    def _subject(self, side: str) -> Any:
        return getattr(self._context, side)

    def _file(self, side: str, layer: int) -> Path:
        subject = self._subject(side)
        return self._context.store.file(subject.revision, self._context.corpus.content_hash, layer, subject.dtype)


def headline(tables: Tables) -> dict[str, float | int | str]:
    """Rows and size."""
    sets = tables[SETS.name]
    return {"n_sets": len(sets), "n_tokens": max(sets["n_tokens"].to_pylist()), "n_bytes": sum(sets["n_bytes"].to_pylist())}


METHOD = Method(
    name="activations",
    version="1",
    kind="stream",
    needs=frozenset({Need.RESIDUALS}),
    settings=ActivationsSettings,
    tables=(SETS,),
    reference="residual stream after each block; Elhage et al. 2021",
    findings=None,
    headline=headline,
    start=ActivationsFold,
)
