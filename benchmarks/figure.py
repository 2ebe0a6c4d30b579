"""One measured figure, and how a run of them is written down."""

import ctypes
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median


@dataclass(frozen=True)
class Figure:
    """A figure with its goal; `better` says which way is better, `parts` what it is made of."""

    name: str
    value: float
    unit: str
    goal: float | None
    better: str
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def met(self) -> str:
        """Whether the goal is met, in words."""
        if self.goal is None:
            return ""
        return "yes" if (self.value <= self.goal if self.better == "lower" else self.value >= self.goal) else "no"


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def steady_heap() -> None:
    """Has glibc keep the memory that it was given, for the rest of this process.

    Else it hands the end of the heap back to the system and takes it again page by page, as often as chance has nothing
    lie behind: between 1 and 15 % of a bare forward's time, and seldom as much of what is compared with it.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_MMAP_MAX, 0)


Clock = Callable[[Callable[[], object]], float]


def cpu_s(work: Callable[[], object]) -> float:
    """Processor seconds of this process: on a shared machine steadier than the clock on the wall."""
    began = time.process_time()
    work()
    return time.process_time() - began


def wall_s(work: Callable[[], object]) -> float:
    """Seconds on the wall."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def device_s(work: Callable[[], object]) -> float:
    """Seconds on the wall until the GPU has finished all that was asked of it."""
    import torch

    torch.cuda.synchronize()
    return wall_s(lambda: (work(), torch.cuda.synchronize()))


def own_peak_mb() -> float:
    """Most memory this process has held; unlike getrusage's figure, free of what its parent held when it forked."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def in_turn(works: dict[str, Callable[[], object]], rounds: int, clock: Clock) -> dict[str, float]:
    """Median of several rounds A B C A B C …, after one round that is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            seconds = clock(work)
            if turn:
                taken[name].append(seconds)
    return {name: median(values) for name, values in taken.items()}


def write(figures: list[Figure], home: Path, docs: Path) -> None:
    """`bench.json` for machines and a Markdown table for people."""
    home.mkdir(parents=True, exist_ok=True)
    (home / "bench.json").write_text(json.dumps([asdict(figure) for figure in figures], indent=1) + "\n")
    lines = [
        "# Benchmarks",
        "",
        "Written by `make bench`: one run, one thread per process; ratios are of times taken within that run, and over "
        "forwards the median of several rounds. The heap keeps what it has, in the floor as in the pass.",
        "",
        "| figure | value | goal | met | parts |",
        "|---|---|---|---|---|",
    ]
    for each in figures:
        sign = "≤" if each.better == "lower" else "≥"
        goal = "" if each.goal is None else f"{sign} {each.goal:g}"
        parts = ", ".join(f"{name} {value:.3g}" for name, value in each.parts.items())
        lines.append(f"| `{each.name}` | {each.value:.3g} {each.unit} | {goal} | {each.met} | {parts} |")
    docs.write_text("\n".join(lines) + "\n")
