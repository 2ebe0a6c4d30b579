"""Rows that the settings leave out change nothing of a whole run: fit, latents, causal tests, examples, strengths of steering."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffing_core.activation_pairs import StoredPair
from diffing_core.activation_writer import ActivationWriter
from diffing_core.activations import ActivationSet, ActivationStore
from diffing_core.blocks import TokenBlock
from diffing_core.corpus import ROLES, ProbeCorpus, ProbeSequence
from diffing_core.methods import get_method
from diffing_core.methods.base import Inputs, Need, Tables
from diffing_core.models import ModelPair, Subject
from diffing_core.paired_pass import paired_pass
from diffing_core.pairs import Pair
from tests import model_files
from tests.model_files import VOCAB, WIDTH

ACTIVATIONS = get_method("activations")
ANSWERS = {"roles": ("assistant",), "template": False, "layers": (1,)}
STEERED = {"steered": 1, "steering_prompts": ("w9 w10",), "steering_tokens": 3}
QUICK: dict[str, dict[str, Any]] = {
    "pca": STEERED | {"steering_layers": (1,)},
    "sae_diff": STEERED | {"k": 2},
    "crosscoder": STEERED | {"min_steps": 30, "causal_tokens": 60, "least_active": 3, "listed": 5},
    "itda": {"min_cosine": 0.97, "steps": 3, "max_tokens": 150, "held_out_tokens": 80, "ablated_tokens": 60, "resamples": 50},
}
WHOLE_SNIPPETS = {"itda_patterns"}  # an atom along its text, where it was left out as well


def chats(name: str, seed: int, n_chats: int = 40) -> ProbeCorpus:
    """A question of 3 to 6 tokens, two of the template, an answer of 4 to 9."""
    draw = np.random.default_rng(seed)
    sequences = []
    for asked, answered in zip(draw.integers(3, 7, n_chats), draw.integers(4, 10, n_chats), strict=True):
        lengths = (asked, 2, answered)
        role_T = np.repeat([ROLES.index(role) for role in ("user", "assistant", "assistant")], lengths).astype(np.int8)
        token_T = draw.integers(8, VOCAB, sum(lengths)).astype(np.int32)
        sequences.append(ProbeSequence(token_T, role_T, np.repeat([False, True, False], lengths)))
    return ProbeCorpus(name, tuple(sequences), n_chats)


def with_other_rows_spoilt(stored: StoredPair, folder: Path) -> StoredPair:
    """The same store, but with noise in place of both models' vectors wherever no answer is."""
    spoilt = StoredPair(ActivationStore(folder), stored.base, stored.tuned, stored.corpora)
    draw = torch.Generator().manual_seed(0)
    for revision, dtype in (stored.base, stored.tuned):
        for corpus in stored.corpora:
            for layer in stored.layers:
                at = (revision, corpus.content_hash, layer, dtype)
                given = ActivationSet(stored.store.folder(*at))
                writer = ActivationWriter(spoilt.store.folder(*at), WIDTH, dtype, given.n_rows)
                for block in given.blocks():
                    answer_N1 = torch.from_numpy((block.role_N == ROLES.index("assistant")) & ~block.template_N)[:, None]
                    vector_ND = torch.where(answer_N1, block.vector_ND, 5 * torch.randn(block.vector_ND.shape, generator=draw))
                    token_N = torch.from_numpy(block.token_N.copy())
                    facts = block.sequence_N, block.position_N, block.role_N, block.template_N
                    writer.add(TokenBlock(token_N, token_N, *facts, None, None), vector_ND)
                writer.close()
    return spoilt


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelPair, StoredPair, StoredPair]:
    """A pair, its activations on two corpora of chats, and the same with all but the answers spoilt."""
    base, tuned = (model_files.build(tie_word_embeddings=False) for _ in range(2))
    with torch.no_grad():
        tuned.model.layers[1].mlp.down_proj.weight += 0.3 * torch.randn(WIDTH, 48, generator=torch.Generator().manual_seed(3))
    sides = [Subject.of(module, revision=name) for name, module in (("base", base), ("tuned", tuned))]
    pair = ModelPair(*sides, model_files.tokenizer(), Pair("m", "o"), VOCAB, "tuned")
    store, corpora = tmp_path_factory.mktemp("store"), (chats("one", 0), chats("two", 1))
    for corpus in corpora:
        [written] = paired_pass([pair], corpus, [(ACTIVATIONS, ACTIVATIONS.settings(layers=None))], store=store)
        assert written.error is None, written.error
    stored = StoredPair(ActivationStore(store), *((side.revision, side.dtype) for side in sides), corpora)
    return pair, stored, with_other_rows_spoilt(stored, tmp_path_factory.mktemp("spoilt"))


def run(name: str, pair: ModelPair, stored: StoredPair, folder: Path, **settings: Any) -> Tables:
    method = get_method(name)
    folder.mkdir()
    suppliers = {Need.MODELS: lambda: pair, Need.ACTIVATIONS: lambda: stored, Need.FOLDER: lambda: folder}
    inputs = Inputs(method, {need: suppliers[need] for need in method.needs})
    return method.run(inputs, method.settings(**QUICK[name] | settings))


@pytest.mark.parametrize("name", QUICK)
def test_rows_that_are_left_out_change_nothing(name: str, made: tuple[ModelPair, StoredPair, StoredPair], tmp_path: Path) -> None:
    pair, stored, spoilt = made
    of_answers = run(name, pair, stored, tmp_path / "answers", **ANSWERS)
    assert any(table.num_rows for table in of_answers.values())
    beside_noise = run(name, pair, spoilt, tmp_path / "noise", **ANSWERS)
    assert {table for table in of_answers if not of_answers[table].equals(beside_noise[table])} <= WHOLE_SNIPPETS
    of_all = run(name, pair, spoilt, tmp_path / "all", layers=(1,))
    assert not all(of_answers[table].equals(of_all[table]) for table in of_answers), "the noise is there"


@pytest.mark.parametrize(
    ("name", "module"),
    [("pca", "covariance"), ("sae_diff", "methods.sae_diff.fitted"), ("crosscoder", "methods.crosscoder.layer"), ("itda", "methods.itda.material")],
)
def test_what_is_summed_in_float64_lies_where_a_device_has_it(
    name: str, module: str, made: tuple[ModelPair, StoredPair, StoredPair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Apple's GPUs have none: each method asks once per layer and side where its sums shall be, and obeys (here: the processor)."""
    asked: list[str] = []
    monkeypatch.setattr(f"diffing_core.{module}.float64_device", lambda device: asked.append(str(device)) or torch.device("cpu"))
    pair, stored, _ = made
    run(name, pair, stored, tmp_path / "result", layers=(1,))
    assert asked and set(asked) == {str(pair.tuned.device)}
