"""Settings and tables of `weight_diff`."""

from pydantic import Field

from diffing_core.settings import Settings
from diffing_core.spectra import ENERGY_SHARES
from diffing_core.tables import Column, TableSpec


class WeightDiffSettings(Settings):
    """Knobs of `weight_diff`."""

    directions: int = Field(16, ge=1, description="Leading singular directions read per module.")
    direction_tokens: int = Field(10, ge=1, description="Tokens listed at either end of a direction.")
    top_tokens: int = Field(100, ge=1, description="Vocabulary entries listed, by the size of their net score.")
    token_rows: int = Field(100, ge=0, description="Rows listed per changed embedding or head.")
    exact_side: int = Field(1024, ge=1, description="Smaller side up to which a dense spectrum is whole.")
    leading: int = Field(64, ge=1, description="Leading singular values listed, and found of larger dense matrices.")
    intruders: int = Field(10, ge=1, description="Leading directions of W_tuned that are looked for in W_base.")
    intruder_side: int = Field(
        1024, ge=0, description="Smaller side up to which the match is exact: 0.4 s a matrix at 1024, 3.2 s at 2048."
    )
    intruder_steps: int = Field(
        48, ge=0, description="Beyond it: steps of the bound, 2 s a matrix at 2048 × 8192; 0: none."
    )
    expert_intruders: bool = Field(
        True, description="Whether every expert's directions are matched too: thousands of matrices, 0.3 s each at 768 × 2048."
    )
    intruder_below: float = Field(0.5, ge=0, le=1, description="A direction whose best match is below is an intruder.")
    seed: int = Field(0, ge=0, description="Of the random range finder.")
    shown: int = Field(40, ge=1, description="Tokens among the findings; three layers and five modules follow.")


def _effect(name: str, doc: str, unit: str = "", dtype: str = "float64") -> Column:
    return Column(name, dtype, doc, unit, "effect", nullable=True, low=0)


EXPERT = Column(
    "expert", "int32", "Number of the expert, from 0, of a tensor that stacks them; null for others.", role="key", nullable=True
)
TENSORS = TableSpec(
    "weight_diff_tensors",
    "Size and shape of every tensor's change, of stacked experts each one's. What a LoRA or DoRA adapter leaves alone is "
    "not listed.",
    ("name", "expert"),
    (
        Column("name", "string", "Tensor, without the wrappers that depend on how it was saved.", role="key"),
        EXPERT,
        Column(
            "status",
            "string",
            "compared, only_in_base, only_in_tuned or other_shape; measures are null but for the first.",
        ),
        Column("layer", "int32", "Block, from 0; null outside of blocks.", nullable=True),
        Column("part", "string", "attn, mlp, norm, embed, head or other."),
        Column("projection", "string", "Name of the module within its part."),
        Column("module", "string", "Path within the block: a bias, and a module of another part, have another one."),
        Column("shape", "list<int32>", "Outputs × inputs; common rows where a vocabulary was resized."),
        Column("n_rows_left_out", "int64", "Rows that only one side has.", role="count"),
        Column("factor_rank", "int32", "Columns of the low-rank factors; null for a dense change.", nullable=True),
        Column("base_frobenius", "float64", "‖W_base‖_F.", nullable=True),
        _effect("frobenius", "‖ΔW‖_F."),
        _effect("relative_frobenius", "‖ΔW‖_F / ‖W_base‖_F; null where the base is zero."),
        _effect("spectral", "Largest singular value of ΔW; matrices only."),
        _effect("nuclear", "Sum of singular values; null where only the leading are known."),
        _effect("effective_rank", "exp(−Σ p ln p), p = σ/Σσ; null where only the leading σ are known."),
        _effect("stable_rank", "‖ΔW‖_F² / σ₁²."),
        _effect("participation_ratio", "(Σσ²)² / Σσ⁴; null where only the leading σ are known."),
        *(
            _effect(name, f"Least number of directions that hold {share:.0%} of ‖ΔW‖_F².", dtype="int32")
            for name, share in ENERGY_SHARES.items()
        ),
        _effect("mean_abs", "Mean of |ΔW|."),
        _effect("max_abs", "Largest |ΔW|."),
        Column(
            "share_unchanged",
            "float64",
            "Share of elements that are equal.",
            nullable=True,
            low=0,
            high=1,
        ),
        Column(
            "share_rounding",
            "float64",
            "Of the changed elements, the share that moved by at most one bfloat16 step of the base's value.",
            nullable=True,
            low=0,
            high=1,
        ),
        Column(
            "rounding_floor",
            "float64",
            "‖ΔW‖_F that rounding W_tuned to bfloat16 leaves by itself: √(Σ step²/12).",
            nullable=True,
            low=0,
        ),
        Column("cosine", "float64", "Cosine between W_base and W_tuned.", nullable=True),
        _effect("intruder_score", "Largest novelty of W_tuned's leading directions, or at least so much (see the intruders); "
                "null where the settings leave it out."),
        _effect("n_intruders", "How many of them are known to match W_base less than `intruder_below`.", dtype="int32"),
    ),
)
LAYERS = TableSpec(
    "weight_diff_layers",
    "Change per block and part, over the tensors that were compared.",
    ("layer", "part"),
    (
        Column("layer", "int32", "Block, from 0; null outside of blocks.", role="key", nullable=True),
        Column("part", "string", "attn, mlp, norm, embed, head or other.", role="key"),
        Column("n_tensors", "int32", "Tensors compared, experts one by one.", role="count"),
        Column("base_frobenius", "float64", "Root of the summed squares of the base's values."),
        _effect("frobenius", "Root of the summed squares of the change."),
        _effect("relative_frobenius", "frobenius / base_frobenius."),
        _effect("share_of_change", "Its part of all summed squares of the change."),
    ),
)
SPECTRUM = TableSpec(
    "weight_diff_spectrum",
    "Leading singular values of every matrix's change.",
    ("name", "expert", "direction"),
    (
        Column("name", "string", "Tensor.", role="key"),
        EXPERT,
        Column("direction", "int32", "1 is the largest.", role="key", low=1),
        Column("title", "string", "The tensor with the number of its expert, as figures name it."),
        _effect("sigma", "Singular value of ΔW."),
        _effect("energy_share", "σ² / ‖ΔW‖_F²."),
        _effect("energy_up_to", "Sum of the energy shares up to this direction."),
    ),
)
INTRUDERS = TableSpec(
    "weight_diff_intruders",
    "Leading left singular vectors of W_tuned and their best match in W_base; an intruder dimension has none.",
    ("name", "expert", "direction"),
    (
        Column("name", "string", "Tensor.", role="key"),
        EXPERT,
        Column("direction", "int32", "1 is the largest of W_tuned.", role="key", low=1),
        Column("sigma", "float64", "Singular value of W_tuned.", low=0),
        Column("match", "float64", "Largest |cos| with any left singular vector of W_base, or what it is at most.", low=0, high=1),
        Column("is_bound", "bool", "Whether it is a bound: beyond `intruder_side`."),
        Column("base_direction", "int32", "Which one, 1 is the largest; null for bounds and where the base is zero.", nullable=True),
        _effect("novelty", "1 − match; of a bound, what it is at least."),
    ),
)
DIRECTIONS = TableSpec(
    "weight_diff_directions",
    "Leading singular directions of modules that write into the residual stream, read through norm and head.",
    ("name", "expert", "direction"),
    (
        Column("name", "string", "Tensor.", role="key"),
        EXPERT,
        Column("direction", "int32", "1 is the largest.", role="key", low=1),
        Column("layer", "int32", "Block, from 0.", nullable=True),
        Column("part", "string", "attn, mlp or other."),
        Column("side", "string", "write: the left singular vector, in the residual stream."),
        _effect("sigma", "Singular value."),
        _effect("energy_share", "σ² / ‖ΔW‖_F²."),
        Column(
            "gain",
            "float64",
            "How much more the tuned model writes along u: (‖uᵀW_tuned‖² − ‖uᵀW_base‖²) / ‖uᵀΔW‖², cut to ±1.",
            role="effect",
            low=-1,
            high=1,
            signed=True,
        ),
        Column("positive_tokens", "list<string>", "Tokens at the farther-reaching end; the sign itself is arbitrary."),
        Column("negative_tokens", "list<string>", "Tokens at the other end."),
        _effect("positive_z", "Lens of the first positive token, standardised over readable tokens."),
        _effect("negative_z", "The same of the first negative token, as a distance from the mean."),
    ),
)
VOCABULARY = TableSpec(
    "weight_diff_vocabulary",
    "Tokens on the directions along which the tuned model writes more, or less, than the base.",
    ("token_id",),
    (
        Column("token_id", "int32", "Vocabulary index.", role="key"),
        Column("token", "string", "The token as text."),
        Column(
            "net_score",
            "float64",
            "The score, each direction weighted by its gain: negative where the base writes more. Ranks the tokens.",
            "mean z²",
            "effect",
        ),
        _effect("score", "σ-weighted mean of z² over all directions; an arbitrary token has 1.", "mean z²"),
        Column("strongest_module", "string", "Tensor that adds most to the net score."),
    ),
)
TOKEN_ROWS = TableSpec(
    "weight_diff_token_rows",
    "Tokens whose row of the embedding or the head changed most, and those of a resized vocabulary that only one side has.",
    ("name", "token_id"),
    (
        Column("name", "string", "Tensor.", role="key"),
        Column("token_id", "int32", "Vocabulary index.", role="key"),
        Column("token", "string", "The token as text; empty where no tokenizer knows it, as with padding."),
        Column("kind", "string", "changed; added: only the tuned model has the row; removed: only the base has it."),
        _effect("own_row_norm", "Length of the row's change without the mean change of all rows, what ranks changed rows; else null."),
        _effect("row_norm", "Length of the row's change; of an added or removed row, its own length."),
        _effect("relative_row_norm", "Over the length of the base's row; null where that is zero, or there is none."),
        _effect("norm_from_mean", "Distance of an added or removed row from the mean of its side's common rows, at which new rows "
                "often begin: what ranks them; null for changed rows."),
    ),
)
