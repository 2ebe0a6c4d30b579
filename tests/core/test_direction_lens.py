"""The lens of directions against closed forms, and the vocabulary that it reads."""

import numpy as np
import pytest
import torch

from diffing_core import direction_lens
from diffing_core.blocks import Side, StreamContext, TokenBlock
from diffing_core.corpus import ProbeCorpus, ProbeSequence
from diffing_core.direction_lens import DirectionLens
from diffing_core.subject import Subject
from tests import model_files
from tests.model_files import LAYERS, VOCAB, WIDTH

EOS = 1  # the one special token
HIDDEN = 9


def lens(
    base: Subject, tuned: Subject, tokens: list[int], state_ND: torch.Tensor | None = None, min_probability: float = 0.0
) -> DirectionLens:
    """A lens that has seen a corpus of one text, with these states at the last layer."""
    n = len(tokens)
    text = ProbeSequence(np.asarray(tokens, np.int32), np.zeros(n, np.int8), np.zeros(n, bool))
    probe = ProbeCorpus("probe", (text,), 1)
    context = StreamContext(base, tuned, model_files.tokenizer(), probe, n_layers=LAYERS, d_model=WIDTH, vocab_size=VOCAB)
    state_ND = torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(1)) if state_ND is None else state_ND
    sides = [Side({LAYERS - 1: state_ND}, LAYERS - 1, each.readout, VOCAB) for each in (base, tuned)]
    made = DirectionLens(context, min_probability)
    places = np.zeros(n, np.int64), np.arange(n), text.role_T, text.template_T
    made.update(TokenBlock(torch.tensor(tokens), torch.tensor(tokens), *places, *sides))
    return made


def directions(n: int = 5) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(n, WIDTH)) * np.array([[1e-4], [1e-1], [1], [10], [1e4]])[:n]


def closed_form(subject: Subject, delta_MD: np.ndarray) -> np.ndarray:
    """head(γ⊙δ̂) in float64; LayerNorm also removes the mean, and no bias enters."""
    norm, head = subject.layout.norm, subject.layout.head
    unit_MD = delta_MD / np.sqrt((delta_MD**2).mean(1, keepdims=True))
    if isinstance(norm, torch.nn.LayerNorm):
        unit_MD = unit_MD - unit_MD.mean(1, keepdims=True)
    return (unit_MD * norm.weight.double().numpy()) @ head.weight.double().numpy().T


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "phi", "gpt_neox", "opt"])
@pytest.mark.parametrize("together", [direction_lens.READ_TOGETHER, 2 * VOCAB])
def test_both_ends_are_those_of_the_closed_form(kind: str, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The toolkit decoded differences as if they were states: with the norm's bias, through one model's head."""
    monkeypatch.setattr(direction_lens, "READ_TOGETHER", together)
    base, tuned = (Subject.of(model_files.build(kind, seed=seed)) for seed in (0, 1))
    reader = lens(base, tuned, list(range(2, 40)))
    for side, subject in (("base", base), ("tuned", tuned)):
        found = reader.read(side, directions(), VOCAB)
        for direction, sign in (("promoted", 1), ("suppressed", -1)):
            logits_MV = sign * closed_form(subject, directions())
            probability_MV = np.exp(logits_MV - np.log(np.exp(logits_MV).sum(1, keepdims=True)))
            assert (np.sort(found[direction].token_MK) == np.delete(np.arange(VOCAB), EOS)).all()
            listed_MK = np.take_along_axis(probability_MV, found[direction].token_MK, 1)
            np.testing.assert_allclose(found[direction].probability_MK, listed_MK, rtol=2e-3)
            assert (np.diff(found[direction].probability_MK) <= 0).all()


def test_the_size_of_a_direction_changes_nothing_and_its_sign_swaps_the_ends() -> None:
    subject = Subject.of(model_files.build())
    reader = lens(subject, subject, [2, 3, 4])
    small, large, turned = (reader.read("base", scale * directions(3), 10) for scale in (1e-5, 1e5, -1))
    np.testing.assert_array_equal(small["promoted"].token_MK, large["promoted"].token_MK)
    np.testing.assert_array_equal(small["promoted"].token_MK, turned["suppressed"].token_MK)


def test_of_equal_tokens_the_smaller_id_comes_first() -> None:
    model = model_files.build(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[20:30] = 10 * model.lm_head.weight[20]
    subject = Subject.of(model)
    reader = lens(subject, subject, [2, 3])
    found = reader.read("base", model.lm_head.weight[20].numpy()[None], 10)["promoted"]
    assert found.token_MK[0].tolist() == list(range(20, 30))


def hidden_token() -> tuple[Subject, torch.Tensor, np.ndarray]:
    """A head with one row of its own direction, states that never predict its token, and a direction that names it."""
    model = model_files.build(tie_word_embeddings=False)
    gain_D = model.model.norm.weight
    unit_D = torch.nn.functional.normalize(torch.randn(WIDTH, generator=torch.Generator().manual_seed(3)), dim=0)
    with torch.no_grad():
        model.lm_head.weight[HIDDEN] = 20 * unit_D / gain_D
    state_ND = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(4)) - 10 * unit_D
    return Subject.of(model), state_ND, unit_D.numpy()[None]


def first_token(tokens: list[int], min_probability: float) -> int:
    subject, state_ND, delta_1D = hidden_token()
    reader = lens(subject, subject, tokens, state_ND, min_probability)
    return int(reader.read("tuned", delta_1D, 5)["promoted"].token_MK[0, 0])


def test_untrained_tokens_do_not_lead_the_list() -> None:
    """No model ever expects them and no text has them, so nothing ever shaped their rows of the head."""
    assert first_token([2, 3, 4, 5, 6, 7], min_probability=1e-8) != HIDDEN
    assert first_token([2, 3, 4, 5, 6, 7], min_probability=0.0) == HIDDEN


def test_a_token_that_the_corpus_has_twice_is_read_however_improbable() -> None:
    assert first_token([HIDDEN, 3, 4, 5, 6, HIDDEN], min_probability=1e-8) == HIDDEN
    assert first_token([HIDDEN, 3, 4, 5, 6, 7], min_probability=1e-8) != HIDDEN


def test_unreadable_tokens_are_never_listed() -> None:
    subject = Subject.of(model_files.build())
    assert EOS not in lens(subject, subject, [EOS, EOS, 2]).vocabulary
