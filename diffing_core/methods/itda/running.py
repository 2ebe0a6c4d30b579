"""From stored activations to the tables of `itda`: dictionaries layer by layer, then what is measured on them."""

from collections.abc import Iterable, Mapping, Sequence
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
from diffing_core.methods.itda.layer_dictionary import kept_or_built, passes
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
from diffing_core.methods.itda.similarity import similarity_rows
from diffing_core.methods.itda.sources import Sources
from diffing_core.progress import track
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
    chosen = Chosen(stored, reading, special, settings)
    with torch.inference_mode():
        results = _results(inputs[Need.FOLDER], stored, layers, chosen, Sources(reading, settings.context_tokens), settings)
        return {
            LAYERS.name: _of_rows(LAYERS, [each.layer_row() for each in results]),
            PASSES.name: _of_rows(PASSES, [row for each in results for row in each.pass_rows()]),
            ATOMS.name: _of_columns(ATOMS, [each.atom_columns([corpus.name for corpus in stored.corpora]) for each in results]),
            NEW_ATOMS.name: _of_columns(NEW_ATOMS, [each.new_atom_columns() for each in results]),
            TOKENS.name: _tokens(results, reading, settings),
            LENS.name: _lens(results, reading, settings),
            EXAMPLES.name: pa.concat_tables([_examples(each, reading) for each in results]),
            PATTERNS.name: _of_rows(PATTERNS, [row for each in results for row in pattern_rows(each, stored.at(each.layer), reading)]),
            SIMILARITY.name: _of_rows(SIMILARITY, similarity_rows(results)),
            ABLATIONS.name: _ablations(results, chosen, reading, settings),
        }


def _results(
    folder: Path, stored: StoredPair, layers: Sequence[int], chosen: Chosen, sources: Sources, settings: ItdaSettings
) -> list[LayerResult]:
    """Dictionaries of all layers; passes that a layer did not need count as done."""
    how, results = settings.construction, []
    tokens_per_layer = passes(how) * settings.max_tokens
    with track(len(layers) * tokens_per_layer, "tokens", "itda") as advance:
        for layer in layers:
            done = 0

            def watched(n_tokens: int, **measures: float) -> None:
                nonlocal done
                done += n_tokens
                advance(n_tokens, **measures)

            material, held_out = chosen.read(stored.at(layer))
            found = kept_or_built(folder, layer, material, how, watched)
            results.append(LayerResult(layer, material, held_out, found, sources, settings))
            advance(tokens_per_layer - done, layer=layer, atoms=len(found.staged.whole))
    return results


def _tokens(results: Sequence[LayerResult], reading: FitReading, settings: ItdaSettings) -> pa.Table:
    """What tuning added to the tokens of the leading new atoms, read through the tuned model's norm and head."""
    rows = []
    for result in results:
        shift_AD = result.new.parts["shift"][: settings.read_atoms]
        if len(shift_AD):
            listed = reading.lens.read("tuned", shift_AD, settings.top_tokens)["promoted"]
            rows += result.token_rows(listed.token_MK, listed.probability_MK)
    texts = reading.context.token_texts([row["token_id"] for row in rows])
    return _of_rows(TOKENS, [row | {"token": text} for row, text in zip(rows, texts, strict=True)])


def _lens(results: Sequence[LayerResult], reading: FitReading, settings: ItdaSettings) -> pa.Table:
    cases = [
        (result.layer, int(atom), part, vector_AD[place])
        for result in results
        for part, vector_AD in result.new.parts.items()
        for place, atom in enumerate(result.leading)
    ]
    if not cases:
        return LENS.empty()
    layer_M, atom_M, part_M, vector_MD = zip(*cases, strict=True)
    groups = {"layer": layer_M, "atom": atom_M, "part": part_M}
    return lens_table(LENS, reading.lens, reading.context, np.stack(vector_MD), groups, settings.top_tokens)


def _examples(result: LayerResult, reading: FitReading) -> pa.Table:
    groups = {"layer": [result.layer] * len(result.leading), "atom": result.leading.tolist()}
    return examples_by_band(EXAMPLES, reading, result.activations, groups, result.settings.examples_per_band)


def _ablations(results: Sequence[LayerResult], chosen: Chosen, reading: FitReading, settings: ItdaSettings) -> pa.Table:
    changed = [result for result in results if len(result.new)]
    if not (changed and settings.ablated_tokens):
        return ABLATIONS.empty()
    behaviour = Behaviour(reading, chosen.held_out_documents(settings.ablated_tokens), [result.layer for result in changed])
    rows: list[dict[str, Any]] = []
    for result in changed:
        effects = Ablation(result.found.staged, result.material, settings).effects(behaviour, result.layer)
        rows += [{"layer": result.layer} | row for row in ablation_rows(effects, behaviour, settings)]
    return _of_rows(ABLATIONS, rows)


def _of_rows(spec: TableSpec, rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    every = list(rows)
    return spec.table({name: [row[name] for row in every] for name in spec.schema.names})


def _of_columns(spec: TableSpec, parts: Sequence[Mapping[str, Any]]) -> pa.Table:
    return pa.concat_tables([spec.table(part) for part in parts])
