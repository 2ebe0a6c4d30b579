"""The table that compares layers: every two of the base's and of the tuned model's, and the noise floor of each."""

from collections.abc import Mapping, Sequence
from itertools import combinations_with_replacement
from typing import Any

import numpy as np

from diffing_core.itda_dictionary import jaccard
from diffing_core.layer_similarity import linear_cka
from diffing_core.methods.itda.layer_tables import LayerResult, Rows

CKA_TOKENS = 1000


def similarity_rows(results: Sequence[LayerResult]) -> Rows:
    """Rows of `itda_similarity`; layers are compared on the tokens that no layer left out."""
    shared = results[0].material.place_N
    for result in results[1:]:
        shared = shared[np.isin(shared, result.material.place_N)]
    places = {(side, result.layer): _places(result, side) for result in results for side in ("base", "tuned", "base_reordered")}
    vectors = {(side, result.layer): _vectors(result, side, shared[:CKA_TOKENS]) for result in results for side in ("base", "tuned")}
    rows = [_row(one, other, places, linear_cka(vectors[one], vectors[other])) for one, other in combinations_with_replacement(vectors, 2)]
    return rows + [_row(("base", each.layer), ("base_reordered", each.layer), places, None) for each in results]


def _row(one: tuple[str, int], other: tuple[str, int], places: Mapping[tuple[str, int], np.ndarray], cka: float | None) -> dict[str, Any]:
    (side, layer), (other_side, other_layer) = one, other
    overlap = jaccard(places[one], places[other])
    keys = {"side": side, "layer": layer, "other_side": other_side, "other_layer": other_layer}
    names = {"name": f"{side} {layer}", "other_name": f"{other_side} {other_layer}"}
    return keys | names | {"jaccard": overlap, "linear_cka": cka}


def _places(result: LayerResult, side: str) -> np.ndarray:
    found = result.found
    tokens = {"base": found.first_pass_I, "tuned": found.tuned_alone_I, "base_reordered": found.reordered_I}[side]
    return result.material.place_N[tokens]


def _vectors(result: LayerResult, side: str, place_N: np.ndarray) -> Any:
    """Vectors of these tokens, in their order."""
    where = {int(place): number for number, place in enumerate(result.material.place_N)}
    return getattr(result.material, f"{side}_ND")[[where[int(place)] for place in place_N]]
