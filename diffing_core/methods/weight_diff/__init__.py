"""What changed in the weights, tensor by tensor, and which tokens the change writes towards; no text is read.

    ΔW = W_tuned − W_base        relative_frobenius = ‖ΔW‖_F / ‖W_base‖_F        (spectral measures: spectra.py)
    lens of direction u:  a_t = cos(h_t, u) in the metric (C + λ I)⁻¹            C = covariance of the h_t
    gain of direction u:  g = (‖uᵀW_tuned‖² − ‖uᵀW_base‖²) / ‖uᵀΔW‖², in [−1, 1]
    net score of token t: Σ_d g_d σ_d z_dt² / Σ_d σ_d                            z = a, standardised over tokens

h_t is the head's row of token t times the final norm's gain, minus the mean over readable tokens; λ is the
mean eigenvalue of C. The directions u_d are the leading left singular vectors of ΔW of every matrix that
writes into the residual stream. Without g an arbitrary token scores 1. g tells a lesson that the tuned model has from
one that both models have: between two seeds of one finetune ΔW lies in the lesson's directions, but neither writes
more there, and g is 0. Measured on the demo: top net score 4.1–9.7 on 16 finetunes, 2.0–2.1 on three
benign ones, 0.4 and 0.5 between twins, whose size alone scores 4.4 and 4.9. Tokens beyond ± 1, what an arbitrary
token has where all is gained, are findings. The metric matters: without it commas and
articles, whose rows are long and lie where all rows lie, head every list. Measured on six demo finetunes: of
the first 20 tokens 3 are words of the lesson with plain logits, 8 with cosines, 11 so.

    intruder score:       1 − max_i |cos(u_k(W_tuned), u_i(W_base))|, largest over the leading k

A high score means that finetuning put a direction among the leading ones that the base did not have. Of large matrices it
is a bound, at least so much (direction_match.py). Experts that one tensor stacks are measured one by one.

A singular direction has no sign; it is turned so that its farther-reaching end in the lens is "positive".
Norms that some models apply between a module and the residual stream (Gemma 2, OLMo 2) are left out.

Reference: Roy and Vetterli 2007; Halko, Martinsson and Tropp 2011; Hu et al. 2021; Shuttleworth et al. 2024.
"""

from typing import Any

import pyarrow as pa

from diffing_core.findings import Finding
from diffing_core.methods.base import Method, Need, Tables
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
from diffing_core.methods.weight_diff.figures import FIGURES
from diffing_core.methods.weight_diff.measuring import run

RELATIVE = "relative change"
ARBITRARY = 1.0  # mean z² of a token that no direction points to


def findings(tables: Tables, settings: WeightDiffSettings) -> list[Finding]:
    """Tokens written towards (negative: away from), then the blocks and modules that changed most for their size."""
    tokens = [row for row in tables[VOCABULARY.name].to_pylist() if abs(row["net_score"]) > ARBITRARY][: settings.shown]
    found = [
        Finding("token", row["token"], row["net_score"], "mean z²", VOCABULARY.name, {"token_id": row["token_id"]})
        for row in tokens
    ]
    for row in _largest(tables[LAYERS.name], 3):
        place = {"layer": row["layer"], "part": row["part"]}
        item = f"layer {row['layer']} {row['part']}"
        found.append(Finding("layer", item, row["relative_frobenius"], RELATIVE, LAYERS.name, place, row["layer"]))
    for row in _largest(tables[TENSORS.name], 5):
        place = {"name": row["name"], "expert": row["expert"]}
        item = row["name"] if row["expert"] is None else f"{row['name']}[{row['expert']}]"
        found.append(Finding("module", item, row["relative_frobenius"], RELATIVE, TENSORS.name, place, row["layer"]))
    return found


def headline(tables: Tables) -> dict[str, float | int | str]:
    """Change over all tensors compared, where it is largest, and on how few directions it lies."""
    layers, tensors = tables[LAYERS.name].to_pylist(), tables[TENSORS.name].to_pylist()
    squares = [sum(row[name] ** 2 for row in layers) for name in ("frobenius", "base_frobenius")]
    matrices = [(row["frobenius"] ** 2, row["stable_rank"]) for row in tensors if row["stable_rank"]]
    weight = sum(square for square, _ in matrices)
    top = _largest(tables[LAYERS.name], 1)
    scores = tables[VOCABULARY.name]["net_score"]
    return {
        "relative_change": (squares[0] / squares[1]) ** 0.5 if squares[1] else 0.0,
        "top_layer": f"{top[0]['layer']} {top[0]['part']}" if top else "none",
        "mean_stable_rank": sum(square * rank for square, rank in matrices) / weight if weight else 0.0,
        "n_tensors_changed": sum(1 for row in tensors if row["frobenius"]),
        "top_token_score": scores[0].as_py() if len(scores) else 0.0,
    }


def _largest(table: pa.Table, n_rows: int) -> list[dict[str, Any]]:
    """Rows of blocks with the largest relative change, none without change."""
    changed = [row for row in table.to_pylist() if row["relative_frobenius"] and row["layer"] is not None]
    return sorted(changed, key=lambda row: -row["relative_frobenius"])[:n_rows]


METHOD = Method(
    name="weight_diff",
    version="5",
    kind="weights",
    needs=frozenset({Need.WEIGHTS}),
    settings=WeightDiffSettings,
    tables=(TENSORS, LAYERS, SPECTRUM, INTRUDERS, DIRECTIONS, VOCABULARY, TOKEN_ROWS),
    reference="Roy and Vetterli 2007; Halko, Martinsson and Tropp 2011; Hu et al. 2021; Shuttleworth et al. 2024",
    findings=findings,
    headline=headline,
    run=run,
    figures=FIGURES,
)
