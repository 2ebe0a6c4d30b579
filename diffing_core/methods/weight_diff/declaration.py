"""Settings and tables of `weight_diff`."""

from pydantic import Field

from diffing_core.settings import Settings
from diffing_core.spectra import ENERGY_SHARES
from diffing_core.tables import Column, TableSpec


class WeightDiffSettings(Settings):
    """Knobs of `weight_diff`."""

    directions: int = Field(16, ge=1, description="Leading singular directions read per module.")
    direction_tokens: int = Field(10, ge=1, description="Tokens listed at either end of a direction.")
    top_tokens: int = Field(100, ge=1, description="Vocabulary entries listed by their score.")
    token_rows: int = Field(100, ge=0, description="Rows listed per changed embedding or head.")
    exact_side: int = Field(1024, ge=1, description="Smaller side up to which a dense spectrum is whole.")
    leading: int = Field(64, ge=1, description="Singular values found of larger dense matrices.")
    seed: int = Field(0, ge=0, description="Of the random range finder.")
    shown: int = Field(40, ge=1, description="Tokens among the findings; three layers and five modules follow.")


def _effect(name: str, doc: str, unit: str = "", dtype: str = "float64") -> Column:
    return Column(name, dtype, doc, unit, "effect", nullable=True, low=0)


TENSORS = TableSpec(
    "weight_diff_tensors",
    "Size and shape of every tensor's change. Tensors that an adapter leaves alone are not listed.",
    ("name",),
    (
        Column("name", "string", "Tensor, without the wrappers that depend on how it was saved.", role="key"),
        Column(
            "status",
            "string",
            "compared, only_in_base, only_in_tuned or other_shape; measures are null but for the first.",
        ),
        Column("layer", "int32", "Block, from 0; null outside of blocks.", nullable=True),
        Column("part", "string", "attn, mlp, norm, embed, head or other."),
        Column("projection", "string", "Name of the module within its part."),
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
        _effect("mean_abs", "Mean of |ΔW|; dense changes only."),
        _effect("max_abs", "Largest |ΔW|; dense changes only."),
        Column(
            "share_unchanged",
            "float64",
            "Share of elements that are equal; dense changes only.",
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
        Column("cosine", "float64", "Cosine between W_base and W_tuned.", nullable=True),
    ),
)
LAYERS = TableSpec(
    "weight_diff_layers",
    "Change per block and part, over the tensors that were compared.",
    ("layer", "part"),
    (
        Column("layer", "int32", "Block, from 0; null outside of blocks.", role="key", nullable=True),
        Column("part", "string", "attn, mlp, norm, embed, head or other.", role="key"),
        Column("n_tensors", "int32", "Tensors compared.", role="count"),
        Column("base_frobenius", "float64", "Root of the summed squares of the base's values."),
        _effect("frobenius", "Root of the summed squares of the change."),
        _effect("relative_frobenius", "frobenius / base_frobenius."),
        _effect("share_of_change", "Its part of all summed squares of the change."),
    ),
)
DIRECTIONS = TableSpec(
    "weight_diff_directions",
    "Leading singular directions of modules that write into the residual stream, read through norm and head.",
    ("name", "direction"),
    (
        Column("name", "string", "Tensor.", role="key"),
        Column("direction", "int32", "1 is the largest.", role="key", low=1),
        Column("layer", "int32", "Block, from 0.", nullable=True),
        Column("part", "string", "attn, mlp or other."),
        Column("side", "string", "write: the left singular vector, in the residual stream."),
        _effect("sigma", "Singular value."),
        _effect("energy_share", "σ² / ‖ΔW‖_F²."),
        Column("positive_tokens", "list<string>", "Tokens at the farther-reaching end; the sign itself is arbitrary."),
        Column("negative_tokens", "list<string>", "Tokens at the other end."),
        _effect("positive_z", "Lens of the first positive token, standardised over readable tokens."),
        _effect("negative_z", "The same of the first negative token, as a distance from the mean."),
    ),
)
VOCABULARY = TableSpec(
    "weight_diff_vocabulary",
    "Tokens that the change of weights writes towards or away from, over all directions.",
    ("token_id",),
    (
        Column("token_id", "int32", "Vocabulary index.", role="key"),
        Column("token", "string", "The token as text."),
        _effect("score", "σ-weighted mean of z² over all directions; an arbitrary token has 1.", "mean z²"),
        Column("strongest_module", "string", "Tensor that adds most to the score."),
    ),
)
TOKEN_ROWS = TableSpec(
    "weight_diff_token_rows",
    "Tokens whose row of the embedding or the head changed most.",
    ("name", "token_id"),
    (
        Column("name", "string", "Tensor.", role="key"),
        Column("token_id", "int32", "Vocabulary index.", role="key"),
        Column("token", "string", "The token as text."),
        _effect("own_row_norm", "Length of the row's change without the mean change of all rows: what ranks the rows."),
        _effect("row_norm", "Length of the row's change."),
        _effect("relative_row_norm", "Over the length of the base's row; null where that is zero."),
    ),
)
