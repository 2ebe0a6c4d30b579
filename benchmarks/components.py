"""Principal components: adding rows to a covariance against the bare product of the same rows."""

from benchmarks.figure import Figure, cpu_s, in_turn

WIDTH, ROWS = 4096, 1024


def covariance() -> list[Figure]:
    """Cost of adding a block of stored (bf16) rows over XᵀX of the same rows in float64, into a matrix that is there."""
    import torch

    from diffing_core.covariance import Covariance

    rows_ND = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()
    double_ND, product_DD = rows_ND.double(), torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    single_ND, single_DD = rows_ND.float(), torch.zeros(WIDTH, WIDTH)
    sums = Covariance(WIDTH)
    taken = in_turn(
        {
            "add (s)": lambda: sums.add(rows_ND),
            "XᵀX (s)": lambda: product_DD.addmm_(double_ND.T, double_ND),
            "XᵀX in float32 (s)": lambda: single_DD.addmm_(single_ND.T, single_ND),
        },
        3,
        cpu_s,
    )
    parts = taken | {"width": WIDTH, "rows per s": ROWS / taken["add (s)"]}
    return [Figure("pca_accumulation_over_product", taken["add (s)"] / taken["XᵀX (s)"], "×", 1.1, "lower", parts)]
