"""Mean differences that lie in the lake, by place: what steering adds to the residual stream.

    stored_vector(lake, pair, "norm_diff", corpus="demo_text", layer=3, mean_over="all")["vector"]
    stored_vector(lake, pair, "adl", corpus="demo_chat", layer=3, counted_from="answer", position=0)["vector"]
"""

from typing import Any

import numpy as np
import pyarrow.compute as pc

from diffing_core.errors import StorageError
from diffing_core.lake import Lake
from diffing_core.methods import get_method
from diffing_core.pairs import Pair


def stored_vector(lake: Lake, pair: Pair, method: str, **where: Any) -> dict[str, Any]:
    """The one row of the method's newest result that has these values; its `vector` is a float32 array [D].

    Raises:
        StorageError: the method stores no vectors, a name is no column, or not exactly one row is meant.
    """
    specs = [spec for spec in get_method(method).tables if "vector" in spec.schema.names]
    if len(specs) != 1:
        raise StorageError(f"method {method!r} has {len(specs)} tables with a column `vector`, expected one")
    rows = lake.read_current(specs[0], pair=pair, method=method)
    keys = ("corpus", *specs[0].grain)
    unknown = sorted(where.keys() - {*keys})
    if unknown:
        raise StorageError(f"table {specs[0].name!r} has no key column(s) {unknown}; its rows are told apart by {keys}")
    found = rows
    for name, value in where.items():
        found = found.filter(pc.is_null(found[name]) if value is None else pc.fill_null(pc.equal(found[name], value), False))
    if len(found) != 1:
        some = (found if len(found) else rows).select(keys).slice(0, 5).to_pylist()
        raise StorageError(f"{len(found)} vectors of {pair} by {method!r} have {where}, expected one; there are, for example, {some}")
    [row] = found.to_pylist()
    return row | {"vector": np.asarray(row["vector"], np.float32)}
