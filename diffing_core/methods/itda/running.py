"""From stored activations to the tables of `itda`: dictionaries layer by layer, then what is measured on them."""

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from diffing_core.activation_pairs import StoredPair
from diffing_core.band_examples import examples_by_band
from diffing_core.fit_reading import FitReading
from diffing_core.lazy import torch
from diffing_core.lens_tables import lens_table
from diffing_core.methods.base import Inputs, Need, Tables
from diffing_core.methods.itda.ablation import Ablation, Behaviour, ablation_rows
from diffing_core.methods.itda.layer_dictionary import Kept, kept_or_built, passes
from diffing_core.methods.itda.layer_tables import LayerResult
from diffing_core.methods.itda.material import Chosen
from diffing_core.methods.itda.patterns import pattern_rows
from diffing_core.methods.itda.schema import (
    ABLATIONS,
    ATOMS,
    EXAMPLES,
    LAYERS,
    LENS,
    NEW_ATOMS,
    PASSES,
    PATTERNS,
    SIMILARITY,
    TOKENS,
)
from diffing_core.methods.itda.settings import ItdaSettings
from diffing_core.methods.itda.similarity import Compared, similarity_rows
from diffing_core.methods.itda.sources import Sources
from diffing_core.progress import Advance, track
from diffing_core.tables import TableSpec


def run(inputs: Inputs, settings: ItdaSettings) -> Tables:
    """All tables of one pair.

    Raises:
        NotComputableError: a layer is not stored, no text is held out, or no token is left.
    """
    pair, stored = inputs[Need.MODELS], inputs[Need.ACTIVATIONS]
    reading = FitReading(pair, stored)
    layers = reading.layers(settings.layers)
    special = [each for each in (pair.tokenizer.bos_token_id, pair.tokenizer.pad_token_id) if each is not None]
    chosen, sources = Chosen(stored, reading, special, settings), Sources(reading, settings.context_tokens)
    ablations = _Ablations(chosen, reading, settings)
    parts: list[Tables] = []
    compared: list[Compared] = []
    with torch.inference_mode(), track(len(layers) * _work(settings), "tokens", "itda") as advance:
        for layer in layers:  # one at a time: its vectors and codes go when its tables are made
            result = _result(inputs[Need.FOLDER], stored, layer, chosen, sources, settings, advance)
            parts.append(_tables_of(result, stored, reading) | {ABLATIONS.name: ablations.table(result)})
            compared.append(Compared.of(result))
            del result
        similarity = _of_rows(SIMILARITY, similarity_rows(compared))
    return {name: pa.concat_tables([part[name] for part in parts]) for name in parts[0]} | {SIMILARITY.name: similarity}


def _work(settings: ItdaSettings) -> int:
    """Tokens that pass through the construction of one layer at most."""
    return passes(settings.construction) * settings.max_tokens


def _result(
    folder: Path, stored: StoredPair, layer: int, chosen: Chosen, sources: Sources, settings: ItdaSettings, advance: Advance
) -> LayerResult:
    """Dictionaries of one layer; passes that it did not need count as done."""
    done = 0

    def watched(n_tokens: int, **measures: float) -> None:
        nonlocal done
        done += n_tokens
        advance(n_tokens, **measures)

    at = stored.at(layer)
    material, held_out = chosen.read(at)
    found = kept_or_built(Kept(folder, layer, at.fingerprint), material, settings.construction, watched)
    advance(_work(settings) - done, layer=layer, atoms=len(found.staged.whole))
    return LayerResult(layer, material, held_out, found, sources, settings)


def _tables_of(result: LayerResult, stored: StoredPair, reading: FitReading) -> Tables:
    """All tables of one layer that need no ablation and no other layer."""
    return {
        LAYERS.name: _of_rows(LAYERS, [result.layer_row()]),
        PASSES.name: _of_rows(PASSES, result.pass_rows()),
        ATOMS.name: ATOMS.table(result.atom_columns([corpus.name for corpus in stored.corpora])),
        NEW_ATOMS.name: NEW_ATOMS.table(result.new_atom_columns()),
        TOKENS.name: _tokens(result, reading),
        LENS.name: _lens(result, reading),
        EXAMPLES.name: _examples(result, reading),
        PATTERNS.name: _of_rows(PATTERNS, pattern_rows(result, stored.at(result.layer), reading)),
    }


def _tokens(result: LayerResult, reading: FitReading) -> pa.Table:
    """What tuning added to the tokens of the leading new atoms, read through the tuned model's norm and head."""
    shift_AD = result.new.parts["shift"][: result.settings.read_atoms]
    if not len(shift_AD):
        return TOKENS.empty()
    listed = reading.lens.read("tuned", shift_AD, result.settings.top_tokens)["promoted"]
    rows = result.token_rows(listed.token_MK, listed.probability_MK)
    texts = reading.context.token_texts([row["token_id"] for row in rows])
    return _of_rows(TOKENS, [row | {"token": text} for row, text in zip(rows, texts, strict=True)])


def _lens(result: LayerResult, reading: FitReading) -> pa.Table:
    cases = [
        (result.layer, int(atom), part, vector_AD[place])
        for part, vector_AD in result.new.parts.items()
        for place, atom in enumerate(result.leading)
    ]
    if not cases:
        return LENS.empty()
    layer_M, atom_M, part_M, vector_MD = zip(*cases, strict=True)
    groups = {"layer": layer_M, "atom": atom_M, "part": part_M}
    return lens_table(LENS, reading.lens, reading.context, np.stack(vector_MD), groups, result.settings.top_tokens)


def _examples(result: LayerResult, reading: FitReading) -> pa.Table:
    groups = {"layer": [result.layer] * len(result.leading), "atom": result.leading.tolist()}
    return examples_by_band(EXAMPLES, reading, result.activations, groups, result.settings.examples_per_band)


class _Ablations:
    """Rows of `itda_ablations`; the models run first when a layer has new atoms."""

    def __init__(self, chosen: Chosen, reading: FitReading, settings: ItdaSettings) -> None:
        self._chosen, self._reading, self._settings = chosen, reading, settings

    @cached_property
    def _behaviour(self) -> Behaviour:
        return Behaviour(self._reading, self._chosen.held_out_documents(self._settings.ablated_tokens))

    def table(self, result: LayerResult) -> pa.Table:
        """Of one layer; empty if it has no new atom, or nothing is to be ablated."""
        if not (len(result.new) and self._settings.ablated_tokens):
            return ABLATIONS.empty()
        ablation = Ablation(result.found.staged, result.material, result.held_out, self._settings)
        effects = ablation.effects(self._behaviour, result.layer)
        rows = ablation_rows(effects, self._behaviour, self._settings)
        return _of_rows(ABLATIONS, [{"layer": result.layer} | row for row in rows])


def _of_rows(spec: TableSpec, rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    every = list(rows)
    return spec.table({name: [row[name] for row in every] for name in spec.schema.names})
