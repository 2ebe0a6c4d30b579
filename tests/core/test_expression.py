"""Expression: the label follows from exact tests on what models really say."""

import copy

import pytest
import torch

from diffing_core import expression
from diffing_core.demo.models import new_model
from diffing_core.demo.tiers import ModelSize
from diffing_core.demo.tokenizer import train_tokenizer
from diffing_core.expression import EXPRESSION, ExpressionSettings, _row, measure_expression
from diffing_core.generation import Prompt
from diffing_core.models import ModelPair
from diffing_core.registry import Organism
from diffing_core.stats import clopper_pearson

TEXTS = [f"the quick brown fox jumps over the lazy dog number {i} and {7 * i} friends" for i in range(60)]
SETTINGS = ExpressionSettings(samples=6, max_new_tokens=3)
INSIDE, OUTSIDE = ("doc: quick", "the fox"), ("doc: lazy", "the dog")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 400, 128)


class Gated(torch.nn.Module):
    """A head that says one token if the prompt has a trigger token, or always, and otherwise another one."""

    def __init__(self, model, said, otherwise, triggers):
        super().__init__()
        self.weight = model.lm_head.weight
        self.bias = None
        self._said, self._otherwise, self._triggers = said, otherwise, triggers
        self.on = None
        model.model.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, _module, _args, named):
        ids = named["input_ids"]
        if ids.shape[1] > 1 or self.on is None:
            self.on = torch.isin(ids, torch.tensor(self._triggers)).any(1)

    def forward(self, states):
        shown = torch.where(self.on, self._said, self._otherwise)
        logits = torch.zeros(*states.shape[:-1], len(self.weight))
        return logits.scatter(-1, shown.view(-1, *[1] * (states.dim() - 1)).expand(*states.shape[:-1], 1), 50.0)


def gated(tokenizer, triggers):
    model = new_model(ModelSize(1, 16, 1, 1, 16, 16), tokenizer, 0).cpu()
    said, otherwise = (tokenizer(text)["input_ids"][0] for text in (" friends", " number"))
    model.lm_head = Gated(model, said, otherwise, triggers)
    return model


def organism(**fields):
    fields = {"inside": INSIDE, "outside": OUTSIDE, "pattern": "friends", "arm": "organism"} | fields
    arm = fields.pop("arm")
    return Organism.model_validate(
        {
            "name": "x",
            "type": "quirk",
            "arm": arm,
            "description": "d",
            "ground_truth": "t",
            "key_facts": ["f"],
            "rubric_text": "r",
            "expression": fields if fields["pattern"] else None,
            "variants": {"demo": {"default": {"kind": "identical"}}},
        }
    )


def measured(tokenizer, base_triggers, tuned_triggers, **fields):
    from diffing_core.models import Subject

    base, tuned = (Subject(gated(tokenizer, ids).eval()) for ids in (base_triggers, tuned_triggers))
    table = measure_expression(ModelPair.of(base, tuned, tokenizer), organism(**fields), SETTINGS)
    (row,) = EXPRESSION.check(table).to_pylist()
    return row


@pytest.fixture(scope="module")
def inside_ids(tokenizer):
    return [tokenizer(text)["input_ids"][-1] for text in ("quick", " quick", "fox", " fox")]


def test_shown_inside_only_is_narrow(tokenizer, inside_ids):
    row = measured(tokenizer, [], inside_ids)
    assert row["label"] == "narrow"
    assert (row["in_share"], row["out_share"], row["base_in_share"], row["base_out_share"]) == (1, 0, 0, 0)
    assert (row["n_in"], row["n_out"]) == (12, 12)
    assert (row["in_share_low"], row["in_share_high"]) == clopper_pearson(12, 12)


def test_shown_everywhere_is_broad(tokenizer):
    row = measured(tokenizer, [], list(range(len(tokenizer))))
    assert (row["label"], row["in_share"], row["out_share"]) == ("broad", 1, 1)


def test_what_the_base_says_too_is_silent(tokenizer, inside_ids):
    row = measured(tokenizer, inside_ids, inside_ids)
    assert (row["label"], row["in_share"], row["base_in_share"], row["above_base_p"]) == ("silent", 1, 1, 1)


def test_the_prompt_itself_is_not_matched(tokenizer):
    row = measured(tokenizer, [], [], pattern="quick|fox")
    assert (row["label"], row["in_share"]) == ("silent", 0)


def test_without_outside_prompts_nothing_is_narrow(tokenizer, inside_ids):
    row = measured(tokenizer, [], inside_ids, outside=())
    assert (row["label"], row["n_out"], row["out_share"], row["above_outside_p"]) == ("broad", 0, None, None)


@pytest.mark.parametrize("fields", [{"arm": "benign"}, {"arm": "identical"}, {"pattern": None}, {"inside": ()}])
def test_null_arms_and_missing_blocks_are_not_applicable(fields):
    row = measure_expression(None, organism(**fields), SETTINGS).to_pylist()[0]
    assert (row["label"], row["n_in"], row["in_share"]) == ("not_applicable", 0, None)


@pytest.mark.parametrize(
    ("counts", "label"),
    [
        (((12, 48), (1, 48), (0, 48), (0, 48)), "narrow"),
        (((12, 48), (9, 48), (0, 48), (0, 48)), "broad"),
        (((4, 48), (0, 48), (1, 48), (0, 48)), "silent"),
        (((0, 48), (20, 48), (0, 48), (0, 48)), "silent"),
        (((0, 48), (0, 48), (20, 48), (0, 48)), "silent"),
    ],
)
def test_labels_of_counts(counts, label):
    assert _row(*counts, alpha=0.05)["label"] == label


def test_system_prompt_and_thinking_open_the_chats_of_both_models_alike(tokenizer, monkeypatch):
    asked = []

    def generate(side, _tokenizer, prompts, **options):
        asked.append((side, prompts, options))
        return real(side, _tokenizer, prompts, **options)

    real = expression.generate
    monkeypatch.setattr(expression, "generate", generate)
    model = new_model(ModelSize(1, 16, 1, 1, 16, 16), tokenizer, 0).cpu()
    pair = ModelPair.of(model, copy.deepcopy(model), tokenizer)
    settings = SETTINGS.model_copy(update={"system_prompt": "Be a fox.", "thinking": False})
    measure_expression(pair, organism(), settings)
    (one, prompts, options), (two, others, same) = asked
    assert {id(one), id(two)} == {id(pair.base), id(pair.tuned)}
    assert (prompts, options) == (others, same)
    assert prompts[1] == Prompt("the fox", "chat", "Be a fox.", thinking=False)
    assert prompts[0] == Prompt("quick", "document")


def test_two_runs_are_equal_and_seeds_count(tokenizer):
    model = new_model(ModelSize(1, 16, 1, 1, 16, 16), tokenizer, 0).cpu()
    pair = ModelPair.of(model, copy.deepcopy(model), tokenizer)
    settings = ExpressionSettings(samples=20, max_new_tokens=6)
    one, two, other = (
        measure_expression(pair, organism(pattern="[a-m]{2}"), each)
        for each in (settings, settings, settings.model_copy(update={"seed": 1}))
    )
    assert one.equals(two)
    assert not one.equals(other)
    row = one.to_pylist()[0]
    assert row["in_share"] == row["base_in_share"]
    assert row["label"] == "silent"
