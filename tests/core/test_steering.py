"""Steering: what is added where, in which batch, and that nothing of it stays."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from diffing_core.capture import capture_residuals
from diffing_core.corpus import TokenBatch
from diffing_core.generation import Prompt, Sampling, generate
from diffing_core.interventions import edited_residual
from diffing_core.models import ModelPair, Subject
from diffing_core.pairs import Pair
from diffing_core.steering import SteeringSettings, steering_spec, steering_table
from diffing_core.tables import Column
from tests import model_files
from tests.model_files import VOCAB, WIDTH

SPEC = steering_spec("toy_steering", (Column("component", "int32", "Number.", role="key"),))
SETTINGS = SteeringSettings(
    steering_prompts=("doc: w5 w6", "doc: w9"), steering_strengths=(0.5, 4.0), steering_samples=2, steering_tokens=5
)


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    base, tuned = (Subject.of(model_files.build(seed=seed), revision=f"weights{seed}") for seed in (0, 1))
    return ModelPair(base, tuned, model_files.tokenizer(), Pair("m", "o"), VOCAB, "weights1")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_block_gives_what_the_edit_makes_of_its_output(kind: str) -> None:
    subject = Subject.of(model_files.build(kind))
    last = subject.n_layers - 1
    token_BT, mask_BT = torch.tensor([[4, 5, 6]]), torch.ones(1, 3, dtype=torch.long)
    batch = TokenBatch(token_BT.numpy(), mask_BT.numpy().astype(bool), [0])
    residual_ND = capture_residuals(subject, batch, (last,))[last]
    with subject.active() as model:
        plain_BTV = model(input_ids=token_BT, attention_mask=mask_BT).logits
        with edited_residual(subject, last, lambda hidden_BTD: hidden_BTD + torch.arange(WIDTH)):
            steered_BTV = model(input_ids=token_BT, attention_mask=mask_BT).logits
        after_BTV = model(input_ids=token_BT, attention_mask=mask_BT).logits
    assert torch.allclose(steered_BTV[0], subject.readout(residual_ND + torch.arange(WIDTH)), atol=1e-5)
    assert not torch.allclose(steered_BTV, plain_BTV, atol=1e-2)
    assert torch.equal(after_BTV, plain_BTV)


def test_texts_equal_those_of_each_direction_alone(pair: ModelPair) -> None:
    vector_MD = np.random.default_rng(0).normal(size=(3, WIDTH)).astype(np.float32)
    rows = steering_table(SPEC, pair, vector_MD, [(1, 2.0), (0, 1.0), (1, 3.0)], {"component": [7, 8, 9]}, SETTINGS).to_pylist()
    assert len(rows) == 3 * 2 * 2 * 2
    prompts = [Prompt.parse(text) for text in SETTINGS.steering_prompts]
    sampling = Sampling(max_new_tokens=5, n=2)
    for number, layer, mean_norm in ((7, 1, 2.0), (8, 0, 1.0), (9, 1, 3.0)):
        unit_D = torch.from_numpy(vector_MD[number - 7]) / np.linalg.norm(vector_MD[number - 7])
        for strength in SETTINGS.steering_strengths:
            with edited_residual(pair.base, layer, lambda hidden, by=strength * mean_norm, unit_D=unit_D: hidden + by * unit_D):
                alone = generate(pair.base.local(), pair.tokenizer, prompts, sampling=sampling, seed=0)
            mine = [row["text"] for row in rows if (row["component"], row["strength"]) == (number, strength)]
            assert mine == [each.text for each in alone]


def test_plain_texts_are_those_that_nobody_steered(pair: ModelPair) -> None:
    vector_1D = np.ones((1, WIDTH), np.float32)
    rows = steering_table(SPEC, pair, vector_1D, [(1, 50.0)], {"component": [0]}, SETTINGS).to_pylist()
    prompts = [Prompt.parse(text) for text in SETTINGS.steering_prompts]
    plain = generate(pair.base.local(), pair.tokenizer, prompts, sampling=Sampling(max_new_tokens=5, n=2), seed=0)
    assert [row["plain_text"] for row in rows] == [each.text for each in plain] * 2
    assert [row["text"] for row in rows] != [row["plain_text"] for row in rows]


def test_a_direction_of_zeros_has_no_rows(pair: ModelPair) -> None:
    assert not len(steering_table(SPEC, pair, np.zeros((2, WIDTH)), [(0, 1.0)] * 2, {"component": [0, 1]}, SETTINGS))


def test_chats_are_passed_over_without_a_template(pair: ModelPair) -> None:
    chats = SteeringSettings(steering_prompts=("Hello",))
    assert not len(steering_table(SPEC, pair, np.ones((1, WIDTH)), [(0, 1.0)], {"component": [0]}, chats))


def test_equal_prompts_are_written_one_by_one_in_a_context_of_their_own(pair: ModelPair) -> None:
    seen: list[int] = []
    prompts = [Prompt("w5", "document")] * 5
    made = generate(
        pair.base, pair.tokenizer, prompts, sampling=Sampling(max_new_tokens=3), seed=0, batch_size=2,
        around=lambda rows: seen.extend(rows) or nullcontext(),
    )  # fmt: skip
    assert sorted(seen) == [0, 1, 2, 3, 4]
    assert len({each.text for each in made}) == 1
