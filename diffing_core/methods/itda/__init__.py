"""Inference-time decomposition: dictionaries whose atoms are real tokens, and those that only the tuned model needs.

A dictionary of unit vectors of real tokens is filled on the base until one more pass adds next to nothing. The tuned model's
vectors of the same tokens then go through the same construction; what is added could not be said with base atoms, and names
itself by its token and text. One more pass of the base is the null. With `settled_share` 0 a base that saturated has just had
a pass that added nothing, and the null pass, which repeats it, adds nothing by construction. The p-value of a layer then counts
texts alone: with k texts in which the tuned model added an atom it is 2^(1 − k). A small one says that tuning changed something,
never that the change is narrow: any finetuning does that. What separates narrow from any change is calibration on null arms.

    rank of new atoms     energy = usage × energy where used, on held-out tuned vectors; with ranked_by added_energy that
                          less the base's (planted at 0.5 % of tokens, orthogonal code: cosine 0.71 to 0.73 against 0.60 to 0.62)
    tokens                Σ over leading new atoms of weight (that by which they are ranked) × p⁺(token) of
                          h_tuned − h_base at the atom's token
    published ordering    mean coefficient in the base's dictionary by plain matching pursuit, tuned − base
    rotation              1 − cos of both models' vectors of the atom's token
    similarity            Jaccard index of the tokens that two dictionaries consist of; linear CKA
    layers matched        share of base layers whose dictionary is most like that of the same layer of the tuned model
    ablation              share of KL(tuned ‖ base) that goes when the tuned model runs without the new atoms

Reference: https://arxiv.org/abs/2505.17769; the staged diff with saturation and null is this project's.
"""

import numpy as np

from diffing_core.figures import Figure
from diffing_core.findings import Finding
from diffing_core.layer_similarity import matched_share
from diffing_core.methods.base import Method, Need, Tables
from diffing_core.methods.itda.running import run
from diffing_core.methods.itda.schema import ABLATIONS, ENERGY, LAYERS, NEW_ATOMS, PASSES, PATTERNS, SIMILARITY, TABLES, TOKENS
from diffing_core.methods.itda.settings import ItdaSettings


def findings(tables: Tables, settings: ItdaSettings) -> list[Finding]:
    """Tokens of new atoms by their weight in all layers together, then source texts of the leading atoms.

    A token is shown by its row of largest weight. A layer is held back unless the tuned model added more atoms than one more
    pass over the base would, in more texts.
    """
    p_values = {row["layer"]: row["p_value"] for row in tables[LAYERS.name].to_pylist() if exceeds_null(row)}
    rows_of: dict[str, list[dict]] = {}
    for row in sorted(_of(tables, TOKENS.name, p_values), key=lambda row: (-row["weight"], -row["layer"], row["rank"])):
        rows_of.setdefault(row["token"], []).append(row)
    tokens = sorted(((sum(row["weight"] for row in rows), rows[0]) for rows in rows_of.values()), key=lambda each: -each[0])
    atoms = sorted(_of(tables, NEW_ATOMS.name, p_values), key=lambda row: (row["rank"], -row["layer"]))
    return [
        Finding(
            "token", row["token"], weight, ENERGY, TOKENS.name, {name: row[name] for name in TOKENS.grain},
            layer=row["layer"], p_value=p_values[row["layer"]],
        )
        for weight, row in tokens[: settings.shown]
    ] + [
        Finding(
            "text_snippet", row["snippet"], row["energy"], ENERGY, NEW_ATOMS.name, {name: row[name] for name in NEW_ATOMS.grain},
            layer=row["layer"], p_value=row["p_value"], q_value=row["q_value"],
        )
        for row in atoms[: settings.shown_sources]
        if row["energy"] > 0
    ]  # fmt: skip


def exceeds_null(row: dict) -> bool:
    """Whether a row of `itda_layers` shows more atoms than the null, in more texts."""
    return row["excess_atoms"] > 0 and row["tuned_documents"] > row["null_documents"]


def headline(tables: Tables) -> dict[str, float | int | str]:
    """The layer with the most new atoms, what they do there, and whether layers are still most like themselves."""
    top = max(tables[LAYERS.name].to_pylist(), key=lambda row: row["excess_atoms"])
    removed = [
        row["removed"]
        for row in tables[ABLATIONS.name].to_pylist()
        if (row["layer"], row["ablated"], row["how"]) == (top["layer"], "new", "turned_back")
    ]
    found = {"excess_atoms": top["excess_atoms"], "base_atoms": top["base_atoms"], "at_layer": top["layer"]}
    found |= {"kl_removed": removed[0]} if removed else {}
    overlap_LL = _overlap(tables)
    return found | ({"layers_matched": matched_share(overlap_LL)} if len(overlap_LL) > 1 else {})


def _overlap(tables: Tables) -> np.ndarray:
    """Jaccard index of the base's layers and the tuned model's, [L, L]; the table has every two once, either first."""
    overlap_of: dict[tuple[int, int], float] = {}
    for row in tables[SIMILARITY.name].to_pylist():
        layer_of = {row["side"]: row["layer"], row["other_side"]: row["other_layer"]}
        if layer_of.keys() == {"base", "tuned"}:
            overlap_of[layer_of["base"], layer_of["tuned"]] = row["jaccard"]
    layers = sorted({layer for layer, _ in overlap_of})
    return np.array([[overlap_of[one, other] for other in layers] for one in layers])


def _of(tables: Tables, name: str, layers: dict[int, float]) -> list[dict]:
    return [row for row in tables[name].to_pylist() if row["layer"] in layers]


METHOD = Method(
    name="itda",
    version="4",
    kind="fit",
    needs=frozenset({Need.ACTIVATIONS, Need.MODELS, Need.FOLDER}),
    settings=ItdaSettings,
    tables=TABLES,
    reference="https://arxiv.org/abs/2505.17769",
    findings=findings,
    headline=headline,
    run=run,
    figures=(
        Figure("line", "Atoms after each pass", PASSES, "pass", "atoms", "side"),
        Figure("heatmap", "New atoms along the texts that they are from", PATTERNS, "place", "tuned", "label"),
        Figure("bar", "New atoms by block", LAYERS, "layer", "excess_atoms"),
        Figure("bar", "Energy of new atoms", NEW_ATOMS, "token", "energy"),
        Figure("heatmap", "Shared atoms of layers", SIMILARITY, "other_name", "jaccard", "name"),
    ),
)
