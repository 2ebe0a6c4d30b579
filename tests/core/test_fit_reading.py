"""What fit methods read with: corpora as one, and the lens of directions."""


import numpy as np
import pytest
import torch

from diffing_core.activation_pairs import StoredPair
from diffing_core.activations import ActivationStore
from diffing_core.corpus import ProbeCorpus, ProbeSequence
from diffing_core.errors import NotComputableError
from diffing_core.fit_reading import FitReading
from diffing_core.methods import get_method
from diffing_core.models import ModelPair, Subject
from diffing_core.paired_pass import paired_pass
from diffing_core.pairs import Pair
from tests import model_files
from tests.model_files import VOCAB, WIDTH

ACTIVATIONS = get_method("activations")


def corpus(name: str, lengths: tuple[int, ...], seed: int) -> ProbeCorpus:
    draw = np.random.default_rng(seed)
    sequences = tuple(
        ProbeSequence(draw.integers(2, VOCAB, n).astype(np.int32), np.zeros(n, np.int8), np.zeros(n, bool)) for n in lengths
    )
    return ProbeCorpus(name, sequences, len(sequences))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelPair, StoredPair]:
    base, tuned = (Subject.of(model_files.build(seed=seed), revision=f"weights{seed}") for seed in (0, 1))
    pair = ModelPair(base, tuned, model_files.tokenizer(), Pair("m", "o"), VOCAB, "weights1")
    store = tmp_path_factory.mktemp("store")
    corpora = corpus("one", (7, 12, 4), 0), corpus("two", (5, 9), 1)
    for each in corpora:
        [result] = paired_pass([pair], each, [(ACTIVATIONS, ACTIVATIONS.settings(layers=None))], store=store)
        assert result.error is None, result.error
    sides = ((side.revision, side.dtype) for side in (base, tuned))
    return pair, StoredPair(ActivationStore(store), *sides, corpora)


def test_sequences_count_through_all_corpora(made: tuple[ModelPair, StoredPair]) -> None:
    pair, stored = made
    reading = FitReading(pair, stored)
    for rows in stored.at(1).blocks():
        for sequence, position, token in zip(reading.sequence_N(rows), rows.position_N, rows.token_N, strict=True):
            assert reading.context.corpus.sequences[sequence].token_T[position] == token
    assert reading.context.corpus.n_tokens == sum(len(rows) for rows in stored.at(1).blocks()) == 37


def test_the_lens_reads_a_direction_as_the_model_does(made: tuple[ModelPair, StoredPair]) -> None:
    pair, stored = made
    reading = FitReading(pair, stored)
    direction_1D = np.random.default_rng(0).normal(size=(1, WIDTH))
    listed = reading.lens.read("tuned", direction_1D, 5)["promoted"]
    logits_V = pair.tuned.lens_of_difference(torch.from_numpy(direction_1D).float())[0]
    order = [token for token in logits_V.argsort(descending=True).tolist() if token in reading.lens.vocabulary]
    assert listed.token_MK[0].tolist() == order[:5]


def test_layers_are_those_stored_for_both_models_and_every_corpus(made: tuple[ModelPair, StoredPair]) -> None:
    pair, stored = made
    assert stored.layers == tuple(range(pair.base.n_layers))
    other = corpus("three", (6,), 2)
    more = StoredPair(stored.store, stored.base, stored.tuned, (*stored.corpora, other))
    with pytest.raises(Exception, match=r"no layer is stored for both models on one\+two\+three; materialize `activations`"):
        more.layers  # noqa: B018
    assert more.content_hash != stored.content_hash


def test_layers_are_chosen_by_depth_among_the_stored_ones(made: tuple[ModelPair, StoredPair]) -> None:
    pair, stored = made
    last = pair.base.n_layers - 1
    reading = FitReading(pair, stored)
    assert reading.layers(None) == stored.layers
    assert reading.layers((1.0,)) == (last,)
    for side in (stored.base, stored.tuned):
        for corpus_of in stored.corpora:
            moved = stored.store.folder(side[0], corpus_of.content_hash, last, side[1])
            moved.rename(moved.with_name(f"aside.{moved.name}"))
    try:
        with pytest.raises(NotComputableError, match=rf"layer\(s\) \[{last}\] of one\+two are not stored, only \[0"):
            reading.layers((0, 1.0))
    finally:
        for aside in stored.store.root.rglob("aside.*"):
            aside.rename(aside.with_name(aside.name.removeprefix("aside.")))
