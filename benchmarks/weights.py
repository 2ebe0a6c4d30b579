"""LoRA measures from the factors against forming the product."""

from benchmarks.figure import Figure, cpu_s, in_turn
from diffing_core.methods.weight_diff.change import Change, intruder_rows, spectrum_rows, tensor_row
from diffing_core.methods.weight_diff.declaration import WeightDiffSettings
from diffing_core.spectra import Factors
from diffing_core.weights import DensePair, TensorDelta

SIZE, RANK = 4096, 16


def lora_spectrum() -> list[Figure]:
    """Measures of a 4096 × 4096 update of rank 16, each way from what is read to the rows of the tables.

    The dense way finds the whole spectrum, by an eigendecomposition of the Gram matrix: the factors give the whole one too.
    Intruders are a figure of their own, with all the rest in it: they are a matter of the whole weights, and no factors spare
    reading those. The dense way matches them exactly, the other by the bound that the settings' defaults take at this size.
    """
    import torch

    torch.manual_seed(0)
    base, down, up = torch.randn(SIZE, SIZE), torch.randn(SIZE, RANK), torch.randn(RANK, SIZE)
    settings = WeightDiffSettings(exact_side=SIZE)
    exact = settings.model_copy(update={"intruder_side": SIZE})

    def measure(matched: WeightDiffSettings | None = None, **given: object) -> None:
        place = ("up_proj.weight", 0, "mlp", "up_proj", (SIZE, SIZE), lambda: base)
        change = Change.of(TensorDelta(*place, **given), settings, torch.Generator())
        tensor_row(change, intruder_rows(change, matched) if matched else None, settings)
        spectrum_rows(change, settings.leading)

    def dense(matched: WeightDiffSettings | None = None) -> None:
        measure(matched, pair=DensePair(base, base + down @ up))

    ways = {
        "spectrum": lambda: Factors(down, up).spectrum(),
        "factors": lambda: measure(factors=Factors(down, up)),
        "intruders": lambda: measure(settings, factors=Factors(down, up)),
    }
    taken = in_turn(ways, 5, cpu_s)
    dense_s = cpu_s(dense)
    with_intruders = {
        "factors, bound of the match (s)": taken["intruders"],
        "dense, exact match (s)": cpu_s(lambda: dense(exact)),
    }
    parts = {
        "factors (s)": taken["factors"],
        "of that singular values (s)": taken["spectrum"],
        "dense, whole eigendecomposition (s)": dense_s,
    }
    bound_s, exact_s = with_intruders.values()
    return [
        Figure("lora_spectrum_speedup", dense_s / taken["factors"], "×", 20, "higher", parts),
        Figure("lora_spectrum_with_intruders_speedup", exact_s / bound_s, "×", 20, "higher", with_intruders),
    ]
