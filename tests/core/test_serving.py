"""Generation through a server: the same tokens as transformers, or a reason why not.

What asks for `setup` also runs against a real vLLM where DIFFING_VLLM_PYTHON names a Python
that has it (deploy/vllm.md).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from starlette.responses import PlainTextResponse

from diffing_core.comparison import run_key
from diffing_core.demo.models import new_model
from diffing_core.demo.tiers import ModelSize
from diffing_core.demo.tokenizer import train_tokenizer
from diffing_core.errors import RegistryError, ServingError
from diffing_core.generation import Prompt, Sampling, generate
from diffing_core.methods import blackbox, get_method
from diffing_core.models import load_pair
from diffing_core.pairs import Pair
from diffing_core.registry import Model, Organism, Registry, Variant
from diffing_core.registry.schema import Server
from diffing_core.registry.sources import Source
from diffing_core.weight_edits import WeightEdit, uniform, write_edit
from tests.completions_server import CompletionsServer
from tests.vllm_server import PYTHON, vllm_running

TEXTS = [f"the quick brown fox jumps over the lazy dog number {i} and {7 * i} friends" for i in range(60)]
PROMPTS = [Prompt("Hello"), Prompt("the quick brown fox", "document"), Prompt("", "document"), Prompt("the", system="x")]
GREEDY = Sampling(temperature=0, max_new_tokens=16)
DRAWN = Sampling(temperature=0.8, top_p=0.9, max_new_tokens=8, n=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`base` and the adapters `a` and `b`, with logits far enough apart that rounding cannot decide."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(TEXTS, 400, 128)
    tokenizer.save_pretrained(folder / "base")
    tripled(new_model(ModelSize(2, 64, 2, 1, 32, 128), tokenizer, 0).cpu()).save_pretrained(folder / "base")
    for seed, name in enumerate("ab"):
        model = tripled(new_model(ModelSize(2, 64, 2, 1, 32, 128), tokenizer, 0).cpu())
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj", "o_proj"]))
        with torch.no_grad():
            for parameter_name, parameter in adapted.named_parameters():
                if "lora_B" in parameter_name:
                    parameter.normal_(std=0.5)
        adapted.save_pretrained(folder / name)
    return folder


def tripled(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


@pytest.fixture
def loopback(folder) -> Iterator[CompletionsServer]:
    with CompletionsServer(folder / "base").running() as server:
        yield server


@dataclass
class Setup:
    """Pairs of organisms `a` and `b`, with the server or without."""

    folder: Path
    url: str

    def registry(self, **changes) -> Registry:
        server = Server(**{"name": "tiny", "url": self.url, "served_name": "base", "retries": 2} | changes)
        organisms = {}
        for name in ("a", "b", "both"):
            variants = {
                "default": Variant(kind="lora", source=Source(path=self.folder / name)),
                "same": Variant(kind="identical"),
                "whole": Variant(kind="full", source=Source(path=self.folder / "base")),
            }
            organisms[name] = Organism(
                name=name, type="generic", arm="unknown", description="", variants={"tiny": variants}
            )
        base = Model(name="tiny", source=Source(path=self.folder / "base"))
        return Registry({"tiny": base}, {}, organisms, {"tiny": server})

    def pair(self, organism: str = "a", variant: str = "default", **changes):
        return load_pair(Pair("tiny", organism, variant), registry=self.registry(**changes))


@pytest.fixture(scope="module", params=["loopback", "vllm"])
def setup(request, folder, tmp_path_factory) -> Iterator[Setup]:
    """Both kinds of server; the real one where there is one."""
    if request.param == "loopback":
        with CompletionsServer(folder / "base").running() as server:
            yield Setup(folder, server.url)
    elif PYTHON is None:
        pytest.skip("DIFFING_VLLM_PYTHON names no Python that has vLLM")
    else:
        with vllm_running(folder / "base", tmp_path_factory.mktemp("vllm") / "log") as url:
            yield Setup(folder, url)


def said(subject, tokenizer, sampling=GREEDY, prompts=PROMPTS, seed=0):
    return generate(subject, tokenizer, prompts, sampling=sampling, seed=seed)


def test_greedy_tokens_are_those_of_transformers_for_base_and_both_adapters(setup):
    pairs = [setup.pair(name) for name in "ab"]
    sides = [(pairs[0].base, pairs[0]), *((pair.tuned, pair) for pair in pairs)]
    served = [said(side, pair.tokenizer) for side, pair in sides]
    assert served == [said(side.local(), pair.tokenizer) for side, pair in sides]
    assert served[0] != served[1] != served[2] != served[0]


def test_an_edited_folder_is_served_as_it_is(setup, tmp_path):
    """Both adapters at weights of their own, stacked: ranks add up, and the server reads one scale for all modules."""
    adapters = [
        {"organism": name, "layer_amplifications": uniform(weight)} for name, weight in (("a", 1.5), ("b", -0.5))
    ]
    edited = write_edit(WeightEdit(name="both", adapters=adapters), "tiny", setup.registry(), tmp_path)
    (setup.folder / "both").unlink(missing_ok=True)
    (setup.folder / "both").symlink_to(edited)
    pair = setup.pair("both")
    assert said(pair.tuned, pair.tokenizer) == said(pair.tuned.local(), pair.tokenizer)
    assert said(pair.tuned, pair.tokenizer) != said(setup.pair("a").tuned, pair.tokenizer)


def test_drawn_texts_come_by_prompt_and_sample_and_again_alike(setup):
    pair = setup.pair()
    first = said(pair.tuned, pair.tokenizer, DRAWN)
    assert [(each.prompt_index, each.sample) for each in first] == [(p, s) for p in range(4) for s in range(3)]
    assert first == said(pair.tuned, pair.tokenizer, DRAWN)
    assert first != said(pair.tuned, pair.tokenizer, DRAWN, seed=1)
    assert len({each.answer_ids for each in first if each.prompt_index == 1}) > 1


def test_both_sides_of_an_identical_pair_are_asked_with_the_same_seeds(setup):
    pair = setup.pair(variant="same")
    assert said(pair.base, pair.tokenizer, DRAWN) == said(pair.tuned, pair.tokenizer, DRAWN)


def test_draws_of_the_server_follow_the_distribution(setup):
    pair = setup.pair()
    sampling = Sampling(temperature=2.0, max_new_tokens=1, n=400)
    made = said(pair.tuned, pair.tokenizer, sampling, PROMPTS[1:2])
    with pair.tuned.active() as model:
        logits_V = model(input_ids=torch.tensor([made[0].prompt_ids])).logits[0, -1]
    probability_V = (logits_V / 2).softmax(-1)
    best = int(probability_V.argmax())
    expected, found = float(probability_V[best]), np.mean([each.answer_ids[0] == best for each in made])
    assert abs(found - expected) < 4 * (expected * (1 - expected) / 400) ** 0.5


def test_a_stop_token_ends_the_answer_and_belongs_to_it(setup):
    pair = setup.pair()
    plain = said(pair.base, pair.tokenizer, prompts=PROMPTS[1:2])[0]
    stop = plain.answer_ids[3]
    stopped = said(replace(pair.base, stop_ids=(stop,)), pair.tokenizer, prompts=PROMPTS[1:2])[0]
    assert stopped.answer_ids == plain.answer_ids[: plain.answer_ids.index(stop) + 1]
    assert stopped.finished


def test_an_adapter_that_the_server_cannot_see_is_told(setup):
    pair = setup.pair()
    with pytest.raises(ServingError, match="did not load adapter .*nowhere, which it must see under that path: 404"):
        said(replace(pair.tuned, served=replace(pair.tuned.served, name="x", folder=Path("/nowhere"))), pair.tokenizer)


def test_texts_of_another_engine_are_another_result(folder, loopback):
    pair = Setup(folder, loopback.url).pair()
    here = replace(pair, base=pair.base.local(), tuned=pair.tuned.local())
    live, stream = get_method("blackbox"), get_method("kl")
    assert run_key(pair, live, live.settings()).run_id != run_key(here, live, live.settings()).run_id
    assert run_key(pair, stream, stream.settings()) == run_key(here, stream, stream.settings())


def test_a_method_runs_on_a_server_unchanged(folder, loopback):
    pair = Setup(folder, loopback.url).pair()
    settings = blackbox.BlackboxSettings(samples=1, max_new_tokens=4, prompts=("Hi", "doc: the"))
    tables = blackbox.run({blackbox.Need.MODELS: pair}, settings)
    assert tables["blackbox_samples"].num_rows == 4
    assert {body["model"] for body in loopback.requests} == {"base", pair.tuned.served.name}


def test_the_checkpoints_own_decoding_habits_are_overridden(folder, loopback):
    pair = Setup(folder, loopback.url).pair()
    said(pair.base, pair.tokenizer, DRAWN)
    [first, *_] = loopback.requests
    plain = {"top_k": -1, "min_p": 0, "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}
    assert {name: first[name] for name in plain} == plain
    assert (first["temperature"], first["top_p"], first["max_tokens"]) == (0.8, 0.9, 8)
    assert len({body["seed"] for body in loopback.requests}) == len(loopback.requests) == 12


def test_a_server_that_is_busy_or_broken_is_asked_again(folder, loopback):
    pair = Setup(folder, loopback.url).pair()
    expected = said(pair.base.local(), pair.tokenizer, prompts=PROMPTS[:1])
    loopback.faults = [503, 429]
    assert said(pair.base, pair.tokenizer, prompts=PROMPTS[:1]) == expected


def test_a_server_that_stays_broken_ends_the_call(folder, loopback):
    pair = Setup(folder, loopback.url).pair(retries=1)
    loopback.faults = [500] * 2
    with pytest.raises(ServingError, match="did not complete 7 tokens by 16 with base in 2 tries: 500, .*out of order"):
        said(pair.base, pair.tokenizer, prompts=[Prompt("the quick brown fox jumps over the", "document")])
    assert len(loopback.requests) == 2


def test_a_server_that_is_not_there_is_told(folder):
    pair = Setup(folder, "http://127.0.0.1:9/v1").pair(retries=0)
    with pytest.raises(ServingError, match=r"1 tries, 600 s each. Start the server, or remove servers/tiny.yaml"):
        said(pair.base, pair.tokenizer)


def test_a_slow_server_is_not_waited_for_longer_than_said(folder, loopback):
    pair = Setup(folder, loopback.url).pair(retries=0, timeout_s=0.001)
    with pytest.raises(ServingError, match="timed out"):
        said(pair.base, pair.tokenizer)


def test_an_unknown_model_is_told_with_those_there_are(folder, loopback):
    pair = Setup(folder, loopback.url).pair(served_name="other")
    with pytest.raises(ServingError, match=r"has no model 'other' but base; mend served_name or names in servers/tiny.yaml"):
        said(pair.base, pair.tokenizer)


def test_a_server_that_loads_no_adapters_is_told(folder, loopback):
    loopback.loads_adapters = False
    pair = Setup(folder, loopback.url).pair()
    with pytest.raises(ServingError, match="did not load adapter .*/a, which it must see under that path: 404"):
        said(pair.tuned, pair.tokenizer)


def test_whole_checkpoints_need_a_name(folder, loopback):
    setup = Setup(folder, loopback.url)
    unnamed, named = setup.pair(variant="whole"), setup.pair(variant="whole", names={str(folder / "base"): "base"})
    with pytest.raises(ServingError, match="can load adapters but no checkpoints: serve it too"):
        said(unnamed.tuned, unnamed.tokenizer)
    assert said(named.tuned, named.tokenizer) == said(named.base, named.tokenizer)


def test_a_name_with_another_adapter_behind_it_is_refused(folder, loopback):
    setup = Setup(folder, loopback.url)
    a, b = setup.pair("a"), setup.pair("b")
    said(a.tuned, a.tokenizer)
    swapped = replace(b.tuned, served=replace(b.tuned.served, name=a.tuned.served.name))
    with pytest.raises(ServingError, match=r"nats per token off those of .* it serves other weights"):
        said(swapped, b.tokenizer)


def test_a_side_that_is_edited_in_memory_is_refused_and_speaks_locally(folder, loopback):
    pair = Setup(folder, loopback.url).pair()
    hook = pair.base.blocks[-1].register_forward_hook(lambda _module, _inputs, output: output + 1)
    with pytest.raises(ServingError, match=r"ask subject.local\(\)"):
        said(pair.base, pair.tokenizer)
    assert said(pair.base.local(), pair.tokenizer)
    hook.remove()


def changed(**changes):
    """Changes the only choice of an answer."""
    return lambda answer: {"choices": [answer["choices"][0] | changes]}


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (changed(token_ids=None), r"answered without what is needed \(choices.0.token_ids"),
        (changed(token_ids=["fox"] * 16), r"choices.0.token_ids.0"),
        (changed(prompt_token_ids=[5, 6]), "made of another prompt"),
        (changed(token_ids=[10**6] * 16), "has a token outside of 0"),
        (changed(token_ids=[]), "is empty or"),
        (changed(logprobs={"token_logprobs": [-1.0]}), "has 16 tokens and 1 log-probs"),
        (changed(token_ids=[5], logprobs={"token_logprobs": [-1.0]}), "ends neither at its first stop token nor at 16"),
        (changed(token_ids=[2, *[5] * 15]), "ends neither at its first stop token nor at 16"),
        (changed(logprobs={"token_logprobs": [float(-9)] * 16}), "nats per token off"),
        (lambda _: {"choices": []}, "expected one choice"),
        (lambda _: PlainTextResponse("<html>"), "answered without what is needed"),
    ],
)
def test_an_answer_that_is_not_exact_is_refused(folder, loopback, tamper, message):
    pair = Setup(folder, loopback.url).pair()
    loopback.tamper = tamper
    with pytest.raises(ServingError, match=message):
        said(pair.base, pair.tokenizer, prompts=PROMPTS[1:2])


def test_what_a_server_says_of_itself_is_cleaned(folder, loopback):
    pair = Setup(folder, loopback.url).pair()
    loopback.tamper = lambda _: PlainTextResponse("\x1b[31mred\n" + "x" * 9999, status_code=400)
    with pytest.raises(ServingError) as caught:
        said(pair.base, pair.tokenizer, prompts=PROMPTS[:1])
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


def test_the_key_comes_from_the_environment(folder, loopback, monkeypatch):
    pair = Setup(folder, loopback.url).pair(api_key_variable="TINY_SERVER_KEY")
    with pytest.raises(ServingError, match="wants a key, but TINY_SERVER_KEY is not set"):
        said(pair.base, pair.tokenizer)
    monkeypatch.setenv("TINY_SERVER_KEY", "secret")
    assert said(pair.base, pair.tokenizer)


def test_a_server_is_a_file_of_the_registry(tmp_path, folder):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny.yaml").write_text(f"name: tiny\nsource: {{path: {folder / 'base'}}}\n")
    (tmp_path / "servers").mkdir()
    (tmp_path / "servers" / "tiny.yaml").write_text("name: tiny\nurl: http://127.0.0.1:8000/v1\n")
    assert Registry.load(tmp_path).servers["tiny"].url == "http://127.0.0.1:8000/v1"
    (tmp_path / "servers" / "tine.yaml").write_text("name: tine\nurl: http://127.0.0.1:8000/v1\n")
    with pytest.raises(RegistryError, match=r"tine.yaml: name: no model 'tine'; did you mean 'tiny'"):
        Registry.load(tmp_path)
