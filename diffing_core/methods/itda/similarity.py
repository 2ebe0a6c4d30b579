"""The table that compares layers: every two of the base's and of the tuned model's, and the noise floor of each.

Of a layer only what this table needs is kept: which tokens its dictionaries consist of, and some of its vectors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any, Self

import numpy as np

from diffing_core.itda_dictionary import jaccard
from diffing_core.layer_similarity import Centred, linear_cka
from diffing_core.methods.itda.layer_tables import LayerResult, Rows
from diffing_core.progress import track

CKA_TOKENS = 1000
KEPT_TOKENS = 1250  # of each layer, since some layers leave out tokens that others have


@dataclass(frozen=True)
class Compared:
    """What is kept of one layer.

    Attributes:
        layer: its number.
        atom_places: side -> places of the tokens that are its dictionary's atoms.
        place_N: places of the tokens whose vectors are kept.
        vectors: side -> their vectors [N, D], in main memory.
    """

    layer: int
    atom_places: Mapping[str, np.ndarray]
    place_N: np.ndarray
    vectors: Mapping[str, Any]

    @classmethod
    def of(cls, result: LayerResult) -> Self:
        """Copies, so that the layer itself can go."""
        found, material = result.found, result.material
        tokens = {"base": found.first_pass_I, "tuned": found.tuned_alone_I, "base_reordered": found.reordered_I}
        place_N = material.place_N
        return cls(
            result.layer,
            {side: place_N[token_I] for side, token_I in tokens.items()},
            place_N[:KEPT_TOKENS].copy(),
            {side: getattr(material, f"{side}_ND")[:KEPT_TOKENS].to("cpu", copy=True) for side in ("base", "tuned")},
        )

    def centred(self, side: str, place_N: np.ndarray) -> Centred:
        """Vectors of these tokens, in their order."""
        where = {int(place): number for number, place in enumerate(self.place_N)}
        return Centred(self.vectors[side][[where[int(place)] for place in place_N]])


def similarity_rows(layers: Sequence[Compared]) -> Rows:
    """Rows of `itda_similarity`; layers are compared on the tokens that no layer left out."""
    shared = layers[0].place_N
    for each in layers[1:]:
        shared = shared[np.isin(shared, each.place_N)]
    places = {(side, each.layer): place_I for each in layers for side, place_I in each.atom_places.items()}
    vectors = {(side, each.layer): each.centred(side, shared[:CKA_TOKENS]) for each in layers for side in ("base", "tuned")}
    pairs = list(combinations_with_replacement(vectors, 2))
    rows = []
    with track(len(pairs), "pairs of layers", "itda similarity") as advance:
        for one, other in pairs:
            rows.append(_row(one, other, places, linear_cka(vectors[one], vectors[other])))
            advance(1)
    return rows + [_row(("base", each.layer), ("base_reordered", each.layer), places, None) for each in layers]


def _row(one: tuple[str, int], other: tuple[str, int], places: Mapping[tuple[str, int], np.ndarray], cka: float | None) -> dict[str, Any]:
    (side, layer), (other_side, other_layer) = one, other
    overlap = jaccard(places[one], places[other])
    keys = {"side": side, "layer": layer, "other_side": other_side, "other_layer": other_layer}
    names = {"name": f"{side} {layer}", "other_name": f"{other_side} {other_layer}"}
    return keys | names | {"jaccard": overlap, "linear_cka": cka}
