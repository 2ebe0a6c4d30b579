"""LoRA measures from the factors against forming the product."""

from benchmarks.figure import Figure, cpu_s, in_turn
from diffing_core.methods.weight_diff.change import Change, spectrum_rows, tensor_row
from diffing_core.methods.weight_diff.declaration import WeightDiffSettings
from diffing_core.spectra import Factors
from diffing_core.weights import DensePair, TensorDelta

SIZE, RANK = 4096, 16


def lora_spectrum() -> list[Figure]:
    """Every measure of a 4096 × 4096 update of rank 16, each way from what is read to the rows of the tables.

    Intruders are left out: they are a matter of the whole weights, and cost the same on both ways.

    The dense way finds the whole spectrum, by an eigendecomposition of the Gram matrix: the factors give the whole one too.
    """
    import torch

    torch.manual_seed(0)
    base, down, up = torch.randn(SIZE, SIZE), torch.randn(SIZE, RANK), torch.randn(RANK, SIZE)
    settings = WeightDiffSettings(exact_side=SIZE)

    def measure(**given: object) -> None:
        place = ("up_proj.weight", 0, "mlp", "up_proj", (SIZE, SIZE), lambda: base)
        change = Change.of(TensorDelta(*place, **given), settings, torch.Generator())
        tensor_row(change, None, settings)
        spectrum_rows(change, settings.leading)

    def dense() -> None:
        measure(pair=DensePair(base, base + down @ up))

    ways = {
        "spectrum": lambda: Factors(down, up).spectrum(),
        "factors": lambda: measure(factors=Factors(down, up)),
    }
    taken = in_turn(ways, 5, cpu_s)
    dense_s = cpu_s(dense)
    parts = {
        "factors (s)": taken["factors"],
        "of that singular values (s)": taken["spectrum"],
        "dense, whole eigendecomposition (s)": dense_s,
    }
    return [Figure("lora_spectrum_speedup", dense_s / taken["factors"], "×", 20, "higher", parts)]
