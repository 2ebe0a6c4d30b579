"""Mean differences read back from the lake."""

from typing import Any

import numpy as np
import pytest

from diffing_core.comparison import run_key, write_result
from diffing_core.corpus import corpus_of_texts
from diffing_core.errors import StorageError
from diffing_core.lake import Lake
from diffing_core.methods import get_method
from diffing_core.models import ModelPair, Subject
from diffing_core.paired_pass import paired_pass
from diffing_core.pairs import Pair
from diffing_core.stored_vectors import stored_vector
from tests import model_files
from tests.model_files import LAYERS, VOCAB

PAIR = Pair("m", "o")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Lake, dict[tuple[str, str], Any]]:
    """A lake with both methods on two corpora, and the tables that were written."""
    lake, tables = Lake(tmp_path_factory.mktemp("lake")), {}
    sides = (Subject.of(model_files.build(seed=seed), revision=str(seed)) for seed in (0, 1))
    pair = ModelPair(*sides, model_files.tokenizer(), PAIR, VOCAB, "adapter")
    methods = [(get_method(name), get_method(name).settings()) for name in ("norm_diff", "adl")]
    for name in ("one", "two"):
        corpus = corpus_of_texts([f"w{n} w{n + 1} w9" for n in range(2, 40, len(name) + 4)], pair.tokenizer, name=name)
        for result in paired_pass([pair], corpus, methods):
            key = run_key(pair, result.method, result.settings).with_corpus(name, corpus.content_hash)
            write_result(lake, key, result)
            tables[result.method.name, name] = result.tables
    return lake, tables


@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_vector_is_found_by_corpus_layer_and_place(stored: tuple[Lake, dict], layer: int) -> None:
    lake, tables = stored
    found = stored_vector(lake, PAIR, "norm_diff", corpus="two", layer=layer, mean_over="position", value=1)
    rows = tables["norm_diff", "two"]["norm_diff_vectors"].to_pylist()
    [row] = [row for row in rows if (row["layer"], row["mean_over"], row["value"]) == (layer, "position", 1)]
    assert found["vector"].dtype == np.float32
    assert found["vector"].tolist() == row["vector"]
    assert found["mean_base_norm"] == row["mean_base_norm"] > 0


def test_the_mean_over_all_tokens_has_no_position(stored: tuple[Lake, dict]) -> None:
    lake, _ = stored
    whole = stored_vector(lake, PAIR, "norm_diff", corpus="one", layer=0, mean_over="all")
    lens = stored_vector(lake, PAIR, "adl", corpus="one", layer=0, position=None)
    np.testing.assert_allclose(whole["vector"], lens["vector"], atol=1e-6)


@pytest.mark.parametrize(
    ("method", "where", "said"),
    [
        ("norm_diff", {"layer": 0, "mean_over": "all"}, "2 vectors"),
        ("norm_diff", {"corpus": "three", "layer": 0}, "0 vectors"),
        ("norm_diff", {"block": 0}, "no key column"),
        ("kl", {}, "0 tables"),
    ],
)
def test_anything_but_one_vector_is_told_with_what_there_is(stored: tuple[Lake, dict], method: str, where: dict, said: str) -> None:
    with pytest.raises(StorageError, match=said):
        stored_vector(stored[0], PAIR, method, **where)
