"""On a GPU: the stream family over bare forwards and the crosscoder, at the shape of a real model, and a profile of the family.

`python -m benchmarks.gpu` writes `gpu_bench.json` and `gpu_profile.txt` to $DIFFING_HOME. With `cpu` as its argument it
runs the same code on a small model, which measures nothing and shows that it works.
"""

import json
import logging
import sys
from dataclasses import asdict
from typing import Any

from benchmarks.dictionaries import Shape, crosscoder_training, latent_scaling
from benchmarks.figure import Clock, Figure, device_s, wall_s
from benchmarks.pairs import cohort, corpus
from benchmarks.stream import over_floor, passed, streams
from diffing_core.models import ModelPair
from diffing_core.settings import diffing_home

QWEN3_1_7B = {"d_model": 2048, "n_layers": 28, "vocabulary": 151936, "head_dim": 128}
CROSSCODER, SMALL_CROSSCODER = Shape(2048, 65_536, 100, "cuda"), Shape(64, 512, 8)
SMALL = {"d_model": 128, "n_layers": 2, "vocabulary": 512}
PROFILED_TOKENS = 8192
PROFILE_ROWS = 40


def throughput(pair: ModelPair, n_tokens: int, clock: Clock) -> list[Figure]:
    """Rate of a pass over the rate of two bare forwards: of every method alone, and of all of them in one pass."""
    alone = [method.name for method, _ in streams()]
    groups: dict[str, tuple[str, ...] | None] = {name: (name,) for name in alone} | {"stream_family": None}
    figures = []
    for name, methods in groups.items():
        ratio, parts = over_floor(pair, n_tokens, methods, clock)
        parts |= {"tokens/s": n_tokens / parts["pass (s)"]}
        figures.append(Figure(f"gpu_{name}_rate_over_bare", 1 / ratio, "×", 0.8, "higher", parts))
    return figures


def profile(pair: ModelPair, n_tokens: int) -> str:
    """Where the time of a pass of the whole family goes, by operation, the most expensive first."""
    from torch.profiler import ProfilerActivity, profile

    probe = corpus(n_tokens, vocabulary=pair.common_vocab)
    on_gpu = pair.base.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as seen:
        passed([pair], probe)
    return seen.key_averages().table(
        sort_by="self_cuda_time_total" if on_gpu else "self_cpu_time_total", row_limit=PROFILE_ROWS
    )


def main(device: str) -> None:
    """Measures and writes both files."""
    import torch

    on_gpu = device == "cuda"
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    where: dict[str, Any] = {"device": device, "dtype": torch.bfloat16 if on_gpu else torch.float32}
    [pair] = cohort(1, **(QWEN3_1_7B if on_gpu else SMALL), on=where)
    n_tokens = 65536 if on_gpu else 2048
    home = diffing_home()
    home.mkdir(parents=True, exist_ok=True)
    clock, shape = (device_s, CROSSCODER) if on_gpu else (wall_s, SMALL_CROSSCODER)
    figures = [*throughput(pair, n_tokens, clock), *crosscoder_training(shape, clock), *latent_scaling((shape,), clock)]
    (home / "gpu_bench.json").write_text(json.dumps([asdict(figure) for figure in figures], indent=1) + "\n")
    (home / "gpu_profile.txt").write_text(profile(pair, min(n_tokens, PROFILED_TOKENS)))
    for figure in figures:
        logging.info("%s = %.3g (goal %s): %s", figure.name, figure.value, figure.goal, figure.parts)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "cuda")
