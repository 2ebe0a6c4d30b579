"""`python -m benchmarks [NAME …]`: runs all benchmarks, or those whose function names are given."""

import logging
import sys
from pathlib import Path

from benchmarks import components, dictionaries, mining, platform, sae, storage, stream, weights
from benchmarks.figure import steady_heap, write
from diffing_core.settings import diffing_home

BENCHMARKS = (
    stream.single_methods,
    stream.family,
    stream.cohort_of_eight,
    stream.memory_growth,
    mining.diff_mining_memory,
    mining.diff_mining_exactness,
    mining.nmf_collection,
    platform.definitions_load,
    platform.partition_overhead,
    storage.parquet,
    storage.shuffling,
    storage.encodings,
    weights.lora_spectrum,
    components.covariance,
    sae.sae_training,
    dictionaries.crosscoder_training,
    dictionaries.latent_scaling,
    dictionaries.latent_scaling_loop,
)


def main(names: list[str]) -> None:
    """Runs, prints and writes them down; a partial run writes nothing."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    steady_heap()
    figures = []
    for benchmark in BENCHMARKS:
        if names and benchmark.__name__ not in names:
            continue
        for figure in benchmark():
            figures.append(figure)
            logging.info("%s = %.3g %s (goal %s): %s", figure.name, figure.value, figure.unit, figure.goal, figure.parts)
    if not names:
        write(figures, diffing_home(), Path(__file__).parent.parent / "docs" / "benchmarks.md")


if __name__ == "__main__":
    main(sys.argv[1:])
