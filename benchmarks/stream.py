"""Cost of the stream methods over the forwards they need, memory against corpus length, cohort against pairs."""

import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.figure import Clock, Figure, cpu_s, in_turn, own_peak_mb
from benchmarks.pairs import WithFloor, bare_forwards, cohort, corpus, stock_peft
from diffing_core.corpus import ProbeCorpus
from diffing_core.methods import all_methods
from diffing_core.models import ModelPair
from diffing_core.paired_pass import MethodResult, paired_pass

VOCABULARY = 8192
TOKENS_PER_BATCH = 2048
PEER = {"d_model": 256, "n_layers": 8, "vocabulary": VOCABULARY}  # the size on which the peer was measured
WARM_UP_TOKENS = 512
LARGER = {"d_model": 768, "n_layers": 12, "vocabulary": VOCABULARY}  # GPT-2 small's size: the forward dominates


def streams(names: tuple[str, ...] | None = None) -> list[tuple]:
    """Stream methods with their default settings."""
    found = [method for method in all_methods().values() if method.kind == "stream"]
    return [(method, method.settings()) for method in found if names is None or method.name in names]


def passed(pairs: list[ModelPair], probe: ProbeCorpus, names: tuple[str, ...] | None = None) -> list[MethodResult]:
    """One paired pass, finished tables included. Stored activations go to a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as store:
        results = list(paired_pass(pairs, probe, streams(names), store=Path(store), tokens_per_batch=TOKENS_PER_BATCH))
    for result in results:
        if result.error is not None:
            raise result.error
    return results


def over_floor(
    pair: ModelPair, n_tokens: int, names: tuple[str, ...] | None = None, clock: Clock = cpu_s
) -> tuple[float, dict[str, float]]:
    """A pass over two bare forwards of the same tokens, tables included, and the parts of that ratio.

    Both run once before, on a few tokens: what a process imports once belongs to neither.
    """
    plain = corpus(n_tokens, vocabulary=pair.common_vocab)
    with stock_peft(pair):
        bare_forwards(pair, itertools.islice(plain.batches(TOKENS_PER_BATCH), 1))
    passed([pair], corpus(WARM_UP_TOKENS, vocabulary=pair.common_vocab), names)
    probe = WithFloor(plain.name, plain.sequences, plain.n_documents, pair=pair, clock=clock)
    results: list[MethodResult] = []
    whole = clock(lambda: results.extend(passed([pair], probe, names)))
    floor = sum(probe.floor_s)
    own = {result.method.name: result.cost.compute_s / floor for result in results}
    heads = heads_s(pair, clock) * n_tokens / TOKENS_PER_BATCH
    return (whole - floor) / floor, {"two forwards (s)": floor, "of which heads (s)": heads, "pass (s)": whole - floor} | own


def in_rounds(
    pair: ModelPair, n_tokens: int, names: tuple[str, ...] | None = None, rounds: int = 3
) -> tuple[float, dict[str, float]]:
    """`over_floor` several times: the median ratio with that round's parts, and the extremes."""
    made = sorted((over_floor(pair, n_tokens, names) for _ in range(rounds)), key=lambda each: each[0])
    ratio, parts = made[len(made) // 2]
    return ratio, parts | {"least": made[0][0], "most": made[-1][0]}


def heads_s(pair: ModelPair, clock: Clock) -> float:
    """Seconds that norm and head of both models take for one batch."""
    import torch

    states_ND = torch.randn(TOKENS_PER_BATCH, pair.base.d_model).to(pair.base.device, pair.base.dtype)
    with torch.inference_mode():
        return min(clock(lambda: [side.readout(states_ND) for side in (pair.base, pair.tuned)]) for _ in range(2))


def single_methods(n_tokens: int = 32768) -> list[Figure]:
    """KL and diff mining alone, on the model size of the peer's measurement (it took 1.28 and 4.6)."""
    goals = {"kl": 1.15, "diff_mining": 1.6}
    [pair] = cohort(1, **PEER)
    made = {name: in_rounds(pair, n_tokens, (name,)) for name in goals}
    return [
        Figure(f"{name}_over_two_forwards", made[name][0], "×", goal, "lower", made[name][1])
        for name, goal in goals.items()
    ]


def family(n_tokens: int = 49152) -> list[Figure]:
    """All stream methods together on a model whose forward dominates; each method's own share as parts.

    One long round: what is done once per corpus, such as a lens sample or topics, weighs as it does on a corpus that people
    probe with, and floor and pass take turns batch by batch anyway.
    """
    [pair] = cohort(1, **LARGER)
    ratio, parts = over_floor(pair, n_tokens)
    return [Figure("stream_family_over_two_forwards", ratio, "×", 1.10, "lower", parts)]


def cohort_of_eight(n_tokens: int = TOKENS_PER_BATCH) -> list[Figure]:
    """Eight adapters in one pass against eight passes of one adapter each: kl and norm_diff, all layers."""
    pairs = cohort(8, **LARGER)
    probe = corpus(n_tokens, vocabulary=VOCABULARY)
    methods = ("kl", "norm_diff")
    made: dict[str, list[MethodResult]] = {}
    taken = in_turn(
        {
            "eight pairs (s)": lambda: made.update(pairs=[each for pair in pairs for each in passed([pair], probe, methods)]),
            "cohort of eight (s)": lambda: made.update(cohort=passed(pairs, probe, methods)),
        },
        2,
        cpu_s,
    )
    ratio = taken["cohort of eight (s)"] / taken["eight pairs (s)"]
    alike = [one.tables[name].equals(other.tables[name]) for one, other in zip(*made.values(), strict=True) for name in one.tables]
    return [
        Figure("cohort8_over_eight_pairs", ratio, "×", 0.60, "lower", taken),
        Figure("cohort8_equal_tables", sum(alike) / len(alike), "share", 1, "higher", {"tables": len(alike)}),
    ]


def memory_growth(short: int = 8192, long: int = 65536) -> list[Figure]:
    """Peak memory of the whole family on a corpus eight times longer, each in a process of its own."""
    peaks = {n: _peak_mb(n) for n in (short, long)}
    parts = {f"{n} tokens (MB)": peak for n, peak in peaks.items()}
    return [Figure("stream_peak_mb_growth", peaks[long] - peaks[short], "MB", 100, "lower", parts)]


def _peak_mb(n_tokens: int) -> float:
    command = [sys.executable, "-m", "benchmarks.stream", str(n_tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    passed(cohort(1, d_model=128, n_layers=4, vocabulary=VOCABULARY), corpus(int(sys.argv[1]), vocabulary=VOCABULARY))
    sys.stdout.write(f"{own_peak_mb()}\n")
