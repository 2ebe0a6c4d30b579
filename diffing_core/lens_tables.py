"""The table of tokens that directions of the residual stream promote and suppress, for any method that finds directions."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from diffing_core.blocks import StreamContext
from diffing_core.direction_lens import DirectionLens
from diffing_core.tables import Column, TableSpec

HEADS = ("base", "tuned")


def lens_spec(name: str, doc: str, groups: tuple[Column, ...]) -> TableSpec:
    """The table; `groups` are the key columns that tell directions apart."""
    return TableSpec(
        name,
        doc,
        (*(column.name for column in groups), "head", "direction", "rank"),
        (
            *groups,
            Column("head", "string", "Whose norm and head decode: base or tuned.", role="key"),
            Column("direction", "string", "promoted (p⁺) or suppressed (p⁻).", role="key"),
            Column("rank", "int32", "1 is likeliest.", role="key", low=1),
            Column("token_id", "int32", "Vocabulary index."),
            Column("token", "string", "The token as text."),
            Column("probability", "float64", "p⁺ or p⁻ of the direction at unit root mean square.", "", low=0, high=1.0001),
        ),
    )


def lens_table(
    spec: TableSpec,
    lens: DirectionLens,
    context: StreamContext,
    direction_MD: np.ndarray,
    groups: Mapping[str, Sequence[Any]],
    top: int,
) -> pa.Table:
    """The `top` tokens of M directions by both heads and signs; `groups` gives each key column its M values.

    A direction of zeros has no rows.
    """
    rows = np.flatnonzero(direction_MD.any(1))
    columns: dict[str, list[Any]] = {name: [] for name in spec.schema.names}
    for head in HEADS if len(rows) else ():
        for direction, listed in lens.read(head, direction_MD[rows], top).items():
            n_listed = listed.token_MK.shape[1]
            for name, values in groups.items():
                columns[name] += [values[row] for row in rows for _ in range(n_listed)]
            columns["head"] += [head] * listed.token_MK.size
            columns["direction"] += [direction] * listed.token_MK.size
            columns["rank"] += [*range(1, n_listed + 1)] * len(rows)
            columns["token_id"] += listed.token_MK.reshape(-1).tolist()
            columns["probability"] += listed.probability_MK.reshape(-1).tolist()
    columns["token"] = context.token_texts(columns["token_id"])
    return spec.table(columns)
