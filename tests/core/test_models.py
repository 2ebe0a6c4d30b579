"""Subjects: running, switching and reading out models that are already built."""

import peft
import pytest
import torch
import transformers as tf

from diffing_core.architecture import hidden_of, layout_of
from diffing_core.errors import ModelLoadError
from diffing_core.models import ModelPair
from diffing_core.subject import Subject
from tests.model_files import ARCHITECTURES, LAYERS, VOCAB, WIDTH, build, tokenizer, tokens


def logits_of(subject: Subject) -> torch.Tensor:
    with subject.active() as model, torch.no_grad():
        return model(**tokens()).logits


@pytest.fixture
def adapted() -> peft.PeftModel:
    """Two adapters on different modules of one copy."""
    torch.manual_seed(2)
    lora = {"r": 2, "init_lora_weights": False}
    model = peft.get_peft_model(build(), peft.LoraConfig(target_modules=["q_proj"], **lora), "first")
    model.add_adapter("second", peft.LoraConfig(target_modules=["down_proj"], modules_to_save=["lm_head"], **lora))
    return model.eval()


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_backbone_and_readout_give_the_models_own_logits(kind):
    subject = Subject.of(build(kind))
    own_BTV = logits_of(subject)
    caught = []
    hook = subject.blocks[-1].register_forward_hook(lambda *given: caught.append(hidden_of(given[2])))
    normed_BTD = subject.backbone(*tokens().values())
    hook.remove()
    assert torch.equal(subject.logits(normed_BTD), own_BTV)
    assert torch.equal(subject.readout(caught[0]), own_BTV)
    assert (subject.n_layers, subject.d_model, subject.vocab_size) == (LAYERS, WIDTH, VOCAB)


@pytest.mark.parametrize(("kind", "unit"), [("llama", 0.0), ("gemma2", 1.0)])
def test_lens_of_difference_is_gain_times_delta_for_rms_norm(kind, unit):
    subject = Subject.of(build(kind))
    delta_ND = torch.randn(4, WIDTH)
    gain_D = unit + subject.layout.norm.weight
    expected_NV = (gain_D * delta_ND) @ subject.layout.head.weight.T
    torch.testing.assert_close(subject.lens_of_difference(delta_ND), expected_NV)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "cohere", "phi"])
def test_lens_of_difference_drops_mean_and_biases_for_layer_norm(kind):
    subject = Subject.of(build(kind))
    delta_ND = torch.randn(4, WIDTH)
    centred_ND = delta_ND - delta_ND.mean(-1, keepdim=True)
    expected_NV = (subject.layout.norm.weight * centred_ND) @ subject.layout.head.weight.T
    torch.testing.assert_close(subject.lens_of_difference(delta_ND), expected_NV)


def test_lens_of_difference_takes_float32_means_of_a_bfloat16_model():
    subject = Subject.of(build().bfloat16())
    lens_NV = subject.lens_of_difference(torch.randn(4, WIDTH))
    assert lens_NV.dtype == torch.bfloat16
    assert not subject.lens_of_difference(torch.zeros(1, WIDTH)).any()


def test_only_the_asked_adapter_is_on_and_the_state_before_is_restored(adapted):
    base = logits_of(Subject(build()))
    own = {}
    for name in ("first", "second"):
        adapted.set_adapter(name)
        own[name] = adapted(**tokens()).logits
    subjects = {name: Subject.of(adapted, name) for name in own}
    plain = Subject.of(adapted)
    with subjects["first"].active():
        assert torch.equal(logits_of(plain), base)
        assert torch.equal(logits_of(subjects["second"]), own["second"])
        assert torch.equal(adapted(**tokens()).logits, own["first"])
    assert not torch.equal(own["first"], base)


def test_an_error_inside_active_restores_too(adapted):
    first, plain = Subject.of(adapted, "first"), Subject.of(adapted)
    expected = logits_of(plain)
    with plain.active() as model:
        with pytest.raises(KeyboardInterrupt), first.active():
            raise KeyboardInterrupt
        assert torch.equal(model(**tokens()).logits, expected)


def test_readout_uses_the_adapters_own_head(adapted):
    with torch.no_grad():
        adapted.base_model.model.lm_head.modules_to_save["second"].weight.add_(1.0)
    second, plain = Subject.of(adapted, "second"), Subject.of(adapted)
    residual_ND = torch.randn(3, WIDTH)
    assert not torch.allclose(second.readout(residual_ND), plain.readout(residual_ND))
    assert second.blocks[0] is plain.blocks[0]


def test_of_freezes_the_module():
    subject = Subject.of(build().train())
    assert not subject.module.training
    assert not subject.backbone(*tokens().values()).requires_grad


def test_unknown_layout_lists_what_was_found():
    model = tf.MambaForCausalLM(tf.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=VOCAB, state_size=4))
    with pytest.raises(ModelLoadError, match=r"MambaForCausalLM is laid out.*backbone\.layers.*model\.layers"):
        layout_of(model)


def test_a_step_between_norm_and_logits_that_is_not_known_is_noticed():
    model = build()
    model.config.logits_scaling = 2.0
    with pytest.raises(ModelLoadError, match="LlamaForCausalLM: final norm and head .* differ from the model's own"):
        Subject.of(model)


def test_overflowing_model_is_refused():
    model = build()
    with torch.no_grad():
        model.lm_head.weight.fill_(3e38)
    with pytest.raises(ModelLoadError, match="NaN or infinite logits in torch.float32"):
        Subject.of(model)


def test_pair_of_modules_without_a_registry(adapted):
    pair = ModelPair.of(Subject.of(adapted), Subject.of(adapted, "first", "abc"), tokenizer())
    assert (pair.pair.key, pair.common_vocab, pair.adapter_hash) == ("adhoc__adhoc__default", VOCAB, "abc")
    smaller = ModelPair.of(build(), build(vocab_size=60), tokenizer())
    assert smaller.common_vocab == 60


def test_hidden_of_takes_a_block_that_gives_a_tuple():
    hidden = torch.zeros(1)
    assert hidden_of((hidden, None)) is hidden
    assert hidden_of(hidden) is hidden
