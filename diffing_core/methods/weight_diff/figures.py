"""What of `weight_diff` a person wants to see drawn."""

from diffing_core.figures import Figure
from diffing_core.methods.weight_diff.declaration import LAYERS, SPECTRUM, TENSORS, TOKEN_ROWS

FIGURES = (
    Figure("heatmap", "Relative change by block and module", TENSORS, "layer", "relative_frobenius", "module", most=16),
    Figure("line", "Relative change by block and part", LAYERS, "layer", "relative_frobenius", "part"),
    Figure("line", "Singular values of the change", SPECTRUM, "direction", "sigma", "title", log=True),
    Figure("line", "Share of a module's change up to a direction", SPECTRUM, "direction", "energy_up_to", "title"),
    Figure("bar", "Tokens whose row changed most", TOKEN_ROWS, "token", "own_row_norm", most=20),
)
