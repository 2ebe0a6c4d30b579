"""Settings and tables of `task_vectors`."""

from pydantic import Field

from diffing_core.methods.weight_diff.declaration import EXPERT
from diffing_core.settings import Settings
from diffing_core.tables import Column, TableSpec


class TaskVectorsSettings(Settings):
    """Knobs of `task_vectors`."""

    overlap_rank: int = Field(8, ge=1, description="Leading singular directions of a matrix that span its subspace.")
    whole_peers: int | None = Field(
        None, ge=0,
        description="Peers that are whole checkpoints, each of which is read through: at most so many, the next ones in the "
        "order of keys, so that 2n + 1 finetunes that each compare n meet each other once. Null: all.",
    )
    shared_energy: float = Field(
        0.5, ge=0, lt=1, description="Share of the other finetunes' change whose leading directions are taken out."
    )
    directions: int = Field(16, ge=1, description="Singular directions of the rest that are read per module.")
    top_tokens: int = Field(100, ge=1, description="Vocabulary entries listed by their score.")
    seed: int = Field(0, ge=0, description="Of the random range finder for large dense matrices.")
    shown: int = Field(40, ge=1, description="Tokens among the findings.")


def _known(name: str, doc: str, high: float | None = None) -> Column:
    return Column(name, "float64", doc, nullable=True, low=0, high=high)


def _effect(name: str, doc: str, low: float | None = 0, high: float | None = None) -> Column:
    return Column(name, "float64", doc, "", "effect", nullable=True, low=low, high=high)


_PEER = (
    Column("peer_organism", "string", "Organism of the other finetune.", role="key"),
    Column("peer_variant", "string", "Its variant, on the same base model.", role="key"),
)
_LIKENESS = (
    Column("n_tensors", "int64", "Tensors that both change and that fit each other, experts one by one.", role="count", low=0),
    _effect("norm", "Length of this finetune's task vector, without vocabulary rows that the other lacks."),
    _known("peer_norm", "Length of the other's, likewise."),
    _effect("cosine", "Inner product over the product of the two lengths; null where one is zero.", -1.001, 1.001),
    Column("overlap_rank", "int64", "Directions compared, over all matrices.", role="count", low=0),
    _effect("left_overlap", "Σ‖U₁ᵀU₂‖² / Σk of the leading output directions: 1 the same space.", 0, 1.001),
    _known("left_expected", "The same of random spaces, Σk²/m over Σk.", 1),
    _effect("right_overlap", "Of the leading input directions.", 0, 1.001),
    _known("right_expected", "The same of random spaces.", 1),
)
PEERS = TableSpec(
    "task_vectors_peers",
    "How far this finetune's change of the base's weights resembles that of every other registered finetune.",
    ("peer_organism", "peer_variant"),
    (
        *_PEER,
        Column("relation", "string", "variant of one organism, twin, original (of which this is the twin) or other."),
        Column("peer_revision", "string", "Content hash or commit of the other's weights; empty if there are none."),
        Column("problem", "string", "Why the other could not be compared; numbers are null then.", nullable=True),
        *_LIKENESS,
    ),
)
PARTS = TableSpec(
    "task_vectors_parts",
    "The same per block and part of the model.",
    ("peer_organism", "peer_variant", "layer", "part"),
    (
        *_PEER,
        Column("layer", "int32", "Block, from 0; null outside of blocks.", role="key", nullable=True),
        Column("part", "string", "attn, mlp, norm, embed, head or other.", role="key"),
        *_LIKENESS,
    ),
)
MODULES = TableSpec(
    "task_vectors_modules",
    "How much of what a module writes into the residual stream lies outside of what other finetunes share.",
    ("name", "expert"),
    (
        Column("name", "string", "Tensor.", role="key"),
        EXPERT,
        Column("layer", "int32", "Block, from 0.", nullable=True),
        Column("part", "string", "attn, mlp or other."),
        Column("projection", "string", "Name of the module within its part."),
        Column("module", "string", "Path within the block."),
        Column("n_peers", "int64", "Other finetunes that change this tensor; related ones do not count.", role="count"),
        Column("n_shared", "int64", "Their leading directions that were taken out.", role="count"),
        _effect("frobenius", "‖ΔW‖_F of the pair."),
        _effect("distinctive_share", "Share of ‖ΔW‖_F² outside of these directions.", 0, 1.001),
        _known("expected_share", "The same if they were random: 1 − n_shared/m.", 1),
    ),
)
VOCABULARY = TableSpec(
    "task_vectors_vocabulary",
    "Tokens that the change writes towards or away from once the directions shared with other finetunes are taken out.",
    ("token_id",),
    (
        Column("token_id", "int32", "Vocabulary index.", role="key"),
        Column("token", "string", "The token as text."),
        Column(
            "net_score", "float64", "The score with every direction weighted by its gain, as in weight_diff; negative where "
            "the base writes more. Ranks the tokens.", "mean z²", "effect",
        ),
        Column(
            "score", "float64", "σ-weighted mean of z² over all directions; an arbitrary token has 1.", "mean z²",
            "effect", low=0,
        ),
        Column("strongest_module", "string", "Tensor that adds most to the net score."),
    ),
)  # fmt: skip
