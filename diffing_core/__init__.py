"""What finetuning changed in a language model: a library that runs in a notebook, without the platform.

    registry (YAML)          -> Registry, Pair
    base + finetunes         -> load_pair, load_cohort   (one resident base, adapters switched on it)
    probe texts              -> corpus_of_texts, load_corpora
    paired pass + methods    -> run_methods -> polars frames by table name
    everything, stored       -> compare -> Parquet lake -> warehouse (DuckDB)

    from diffing_core import corpus_of_texts, load_pair, run_methods
    pair = load_pair(load_registry().organism("cake_bake"), model="demo")
    frames = run_methods(pair, corpus_of_texts(texts, pair.tokenizer), ["kl", "diff_mining", "norm_diff"])
    frames["findings"]
"""

from diffing_core.comparison import compare, load_corpora, run_methods
from diffing_core.corpus import corpus_of_texts
from diffing_core.lake import Lake
from diffing_core.methods import all_methods
from diffing_core.models import load_cohort, load_pair
from diffing_core.pairs import Pair
from diffing_core.registry import Registry, load_registry

__all__ = [
    "Lake",
    "Pair",
    "Registry",
    "all_methods",
    "compare",
    "corpus_of_texts",
    "load_cohort",
    "load_corpora",
    "load_pair",
    "load_registry",
    "run_methods",
]
