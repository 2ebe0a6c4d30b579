"""The run of `weight_diff`: one pass over the tensors of a pair, then the lens over what they write."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from diffing_core.lazy import torch
from diffing_core.methods.base import Inputs, Need, Tables
from diffing_core.methods.weight_diff.change import (
    Change,
    intruder_rows,
    layer_rows,
    spectrum_rows,
    tensor_row,
    unmatched_row,
)
from diffing_core.methods.weight_diff.declaration import (
    DIRECTIONS,
    INTRUDERS,
    LAYERS,
    SPECTRUM,
    TENSORS,
    TOKEN_ROWS,
    VOCABULARY,
    WeightDiffSettings,
)
from diffing_core.methods.weight_diff.directions import Written, read_directions
from diffing_core.methods.weight_diff.token_rows import RowSizes, sizes_of, token_rows
from diffing_core.tables import TableSpec
from diffing_core.weights import OpenPair, WeightPair


def run(inputs: Inputs, settings: WeightDiffSettings) -> Tables:
    """The seven tables of one pair; no rows where both sides are the same files."""
    pair: WeightPair = inputs[Need.WEIGHTS]
    generator = torch.Generator().manual_seed(settings.seed)
    tensors: list[dict[str, Any]] = []
    spectrum: list[dict[str, Any]] = []
    intruders: list[dict[str, Any]] = []
    written: list[Written] = []
    changed_rows: list[RowSizes] = []
    opened = OpenPair(pair)
    for delta in (each for name in opened.names for each in opened.deltas(name)):
        change = Change.of(delta, settings, generator)
        own_intruders = intruder_rows(change, settings)
        tensors.append(tensor_row(change, own_intruders, settings))
        intruders += own_intruders or []
        spectrum += spectrum_rows(change, settings.leading)
        if change.writes():
            k = settings.directions
            found = change.spectrum
            sizes = (found.sigma_K[:k], found.energy_shares_K[:k], change.gain(k))
            written.append(Written(delta.name, delta.expert, delta.layer, delta.part, found.left_MK[:, :k].T.clone(), *sizes))
        changed_rows += sizes_of(change)
    layers = layer_rows(tensors)
    tensors += [unmatched_row(each.name, each.status, each.shape) for each in opened.unmatched]
    directions, vocabulary = read_directions(pair, written, settings)
    return {
        TENSORS.name: _table(TENSORS, tensors),
        LAYERS.name: _table(LAYERS, layers),
        SPECTRUM.name: _table(SPECTRUM, spectrum),
        INTRUDERS.name: _table(INTRUDERS, intruders),
        DIRECTIONS.name: _table(DIRECTIONS, directions),
        VOCABULARY.name: _table(VOCABULARY, vocabulary),
        TOKEN_ROWS.name: _table(TOKEN_ROWS, token_rows(pair, changed_rows, settings.token_rows)),
    }


def _table(spec: TableSpec, rows: list[Mapping[str, Any]]) -> pa.Table:
    return spec.table({name: [row[name] for row in rows] for name in spec.schema.names})
