"""Which finetunes of a base changed its weights alike, and what a finetune writes that others do not; no text is read.

    τ = θ_tuned − θ_base model            cosine = Σ⟨ΔW₁, ΔW₂⟩ / √(Σ‖ΔW₁‖² Σ‖ΔW₂‖²) over all tensors
    overlap of rank-k spaces = ‖U₁ᵀU₂‖_F² / k, of random ones k/m          (U left: outputs, V right: inputs)
    rest = (I − SSᵀ) ΔW        distinctive_share = ‖rest‖² / ‖ΔW‖²         net score of a token: as weight_diff, of the rest

S are the leading output directions that hold half of the change of the other finetunes of the base: what a recipe,
a format or training as such writes into the residual stream. Variants and twins of the same organism do not count
there, for they learnt the very same. τ starts at the base model for twins too, ΔW at what the pair is compared with.
The cosine is global, never a mean over modules, which would let a hardly changed module speak as loudly as the largest;
1 − |cosine| is the orthogonality of task arithmetic. LoRA adapters are compared by their factors.

What to read. Two adapters that began from the same random numbers keep most of their input directions whatever they
learnt, so cosine and right_overlap ask first who began alike and left_overlap what was learnt. Measured on the demo:

                                          cosine       left overlap   right overlap
    variants of one organism, same start    0.61–0.83    0.44–0.70      0.81–0.87
    seed twins, another start               0.12–0.15    0.19–0.23      0.08–0.10
    adapter and whole finetune of one lesson     0.09    0.25–0.29      0.15–0.16
    other lessons, same start               0.00–0.07    0.07–0.09      0.60–0.80
    other lessons, another start            0.00–0.01    0.07–0.09      0.06
    random spaces                           0            0.07           0.06

The demo's finetunes share no output directions beyond chance: a share of 0.80 to 0.91 of a change is distinctive, of
random directions 0.90. So the tokens of the rest are no better than weight_diff's there (165 words of the lesson against
173 among the first 20 of 16 finetunes; first net scores 3.8 to 9.3, benign nulls 2.0, twins below 0). Taking out what is
shared is for finetunes that have a format or a recipe in common.

Reference: Ilharco et al. 2022 (task arithmetic); Hu et al. 2021, Grassmann subspace similarity.
"""

from typing import Any

from diffing_core.figures import Figure
from diffing_core.findings import Finding
from diffing_core.methods.base import Method, Need, Tables
from diffing_core.methods.task_vectors.declaration import MODULES, PARTS, PEERS, VOCABULARY, TaskVectorsSettings
from diffing_core.methods.task_vectors.measuring import run
from diffing_core.methods.weight_diff import ARBITRARY

FIGURES = (
    Figure("heatmap", "Cosine to every other finetune", PEERS, "peer_variant", "cosine", "peer_organism", most=40),
    Figure("heatmap", "Overlap of output directions", PEERS, "peer_variant", "left_overlap", "peer_organism", most=40),
    Figure("heatmap", "Share outside of what others share", MODULES, "layer", "distinctive_share", "module"),
)


def findings(tables: Tables, settings: TaskVectorsSettings) -> list[Finding]:
    """Tokens that the rest writes towards (negative: away from). No peer is named: agents read findings."""
    tokens = [row for row in tables[VOCABULARY.name].to_pylist() if abs(row["net_score"]) > ARBITRARY]
    return [
        Finding("token", row["token"], row["net_score"], "mean z²", VOCABULARY.name, {"token_id": row["token_id"]})
        for row in tokens[: settings.shown]
    ]


def headline(tables: Tables) -> dict[str, float | int | str]:
    """How many peers there are, the most similar one, and how much is distinctive."""
    rows = [row for row in tables[PEERS.name].to_pylist() if row["cosine"] is not None]
    closest: dict[str, Any] | None = max(rows, key=lambda row: abs(row["cosine"]), default=None)
    modules = tables[MODULES.name].to_pylist()
    whole = sum(row["frobenius"] ** 2 for row in modules)
    rest = sum(row["distinctive_share"] * row["frobenius"] ** 2 for row in modules)
    scores = tables[VOCABULARY.name]["net_score"]
    return {
        "n_peers": len(rows),
        "n_peers_unread": sum(row["problem"] is not None for row in tables[PEERS.name].to_pylist()),
        "closest_peer": f"{closest['peer_organism']} {closest['peer_variant']}" if closest else "none",
        "closest_cosine": closest["cosine"] if closest else 0.0,
        "distinctive_share": rest / whole if whole else 0.0,
        "top_token_score": scores[0].as_py() if len(scores) else 0.0,
    }


METHOD = Method(
    name="task_vectors",
    version="4",
    kind="weights",
    needs=frozenset({Need.WEIGHTS, Need.PEERS}),
    settings=TaskVectorsSettings,
    tables=(PEERS, PARTS, MODULES, VOCABULARY),
    reference="Ilharco et al. 2022; Hu et al. 2021",
    findings=findings,
    headline=headline,
    run=run,
    figures=FIGURES,
)
