"""LoRA spectra from the factors against forming the product."""

from benchmarks.figure import Figure, cpu_s, in_turn
from diffing_core.spectra import Factors

SIZE, RANK = 4096, 16


def lora_spectrum() -> list[Figure]:
    """All singular values of a 4096 × 4096 update of rank 16."""
    import torch

    torch.manual_seed(0)
    down, up = torch.randn(SIZE, RANK), torch.randn(RANK, SIZE)
    factors_s = in_turn({"factors": lambda: Factors(down, up).spectrum()}, 5, cpu_s)["factors"]
    dense_s = cpu_s(lambda: torch.linalg.svdvals(down @ up))
    parts = {"factors (s)": factors_s, "dense (s)": dense_s}
    return [Figure("lora_spectrum_speedup", dense_s / factors_s, "×", 20, "higher", parts)]
