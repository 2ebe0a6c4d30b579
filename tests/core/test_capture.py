"""Residuals as Hugging Face gives them, at valid tokens only, and no block run in vain."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers as tf

from diffing_core.capture import Room, capture_residuals
from diffing_core.corpus import TokenBatch
from diffing_core.models import Subject
from tests import model_files
from tests.model_files import LAYERS

LENGTHS = (6, 4, 1)


def batch(seed: int = 0) -> TokenBatch:
    """Three sequences, padded with token 0."""
    mask_BT = np.arange(max(LENGTHS)) < np.asarray(LENGTHS)[:, None]
    token_BT = np.random.default_rng(seed).integers(1, model_files.VOCAB, mask_BT.shape) * mask_BT
    return TokenBatch(token_BT, mask_BT, (4, 2, 0))


@contextmanager
def counted(subject: Subject) -> Iterator[list[int]]:
    """How often each block ran."""
    runs = [0] * len(subject.blocks)

    def count(layer: int) -> None:
        runs[layer] += 1

    handles = [
        block.register_forward_pre_hook(lambda *_, layer=layer: count(layer))
        for layer, block in enumerate(subject.blocks)
    ]
    yield runs
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "gpt2", "gpt_neox"])
def test_residuals_equal_hidden_states_of_each_sequence_alone(kind: str) -> None:
    subject = Subject.of(model_files.build(kind))
    given = batch()
    captured = capture_residuals(subject, given, range(LAYERS))
    row = 0
    for tokens_T, length in zip(given.token_BT, LENGTHS, strict=True):
        alone = subject.module(torch.from_numpy(tokens_T[None, :length]), output_hidden_states=True).hidden_states
        rows = slice(row, row + length)
        for layer in range(LAYERS - 1):
            torch.testing.assert_close(captured[layer][rows], alone[layer + 1][0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(subject.normed(captured[LAYERS - 1][rows]), alone[LAYERS][0], atol=1e-5, rtol=1e-4)
        row += length
    assert len(captured[0]) == row == sum(LENGTHS)


@pytest.mark.parametrize(
    ("layers", "runs"), [((0,), [1, 0, 0]), ((1, 0), [1, 1, 0]), ((2,), [1, 1, 1]), ((), [0, 0, 0])]
)
def test_blocks_above_the_last_asked_one_are_not_run(layers: tuple[int, ...], runs: list[int]) -> None:
    subject = Subject.of(model_files.build())
    with counted(subject) as seen:
        captured = capture_residuals(subject, batch(), layers)
    assert sorted(captured) == sorted(layers)
    assert seen == runs


def test_wanted_tokens_are_put_over_those_of_the_last_call() -> None:
    subject, given, other = Subject.of(model_files.build()), batch(), batch(seed=1)
    room, wanted = Room(sum(LENGTHS)), np.asarray([1, 2, 6, 12])
    whole, of_other = (capture_residuals(subject, each, [0, 2]) for each in (given, other))
    rows_N = np.searchsorted(np.flatnonzero(given.mask_BT), wanted)
    first = capture_residuals(subject, given, [0, 2], wanted, room)
    for layer in (0, 2):
        assert torch.equal(first[layer], whole[layer][rows_N])
    second = capture_residuals(subject, other, [0, 2], room=room)
    for layer in (0, 2):
        assert torch.equal(second[layer], of_other[layer])
        assert first[layer].data_ptr() == second[layer].data_ptr()


def test_no_hook_stays_behind_even_if_the_forward_fails() -> None:
    subject = Subject.of(model_files.build())
    beyond = batch()
    beyond.token_BT[0, 0] = model_files.VOCAB + 5
    with pytest.raises(IndexError):
        capture_residuals(subject, beyond, [0, 2])
    capture_residuals(subject, batch(), [0, 1])
    assert all(not block._forward_hooks for block in subject.blocks)


def test_an_early_end_leaves_the_adapter_switched_as_it_was(tmp_path: Path) -> None:
    base = model_files.save_base(tmp_path / "base")
    adapter = model_files.save_adapter(tmp_path / "adapter", base)
    module = peft.PeftModel.from_pretrained(tf.AutoModelForCausalLM.from_pretrained(base), adapter)
    plain, adapted = Subject.of(module), Subject.of(module, "default")
    before, tuned, after = (capture_residuals(each, batch(), [0])[0] for each in (plain, adapted, plain))
    assert torch.equal(before, after)
    assert (tuned - before).abs().max() > 1e-3
