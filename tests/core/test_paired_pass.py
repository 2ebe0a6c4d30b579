"""The paired pass against plain forwards of the same models, and what it shares and leaves out."""

import gc
import itertools
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pyarrow as pa
import pytest
import torch
import transformers as tf

from diffing_core import blocks as blocks_module
from diffing_core import paired_pass as paired_pass_module
from diffing_core.blocks import StreamContext, TokenBlock, pick_layers
from diffing_core.corpus import ProbeCorpus, ProbeSequence
from diffing_core.errors import CorpusError, ModelLoadError, NotComputableError, UndeclaredNeedError
from diffing_core.methods import get_method
from diffing_core.methods.base import Inputs, Method, Need
from diffing_core.models import ModelPair, Subject
from diffing_core.paired_pass import MethodResult, affordable_tokens, paired_pass, timed_run
from diffing_core.pairs import Pair
from diffing_core.settings import Settings
from tests import model_files
from tests.model_files import LAYERS, VOCAB

LENGTHS = (12, 9, 5, 12, 7, 1, 3)
PER_BLOCK = 16
BOTH = frozenset({Need.RESIDUALS, Need.LOGPROBS})


def corpus(skip: int = 0) -> ProbeCorpus:
    """Random tokens with random roles and flags."""
    draw = np.random.default_rng(0)
    sequences = tuple(
        ProbeSequence(
            draw.integers(0, VOCAB, n).astype(np.int32), draw.integers(0, 5, n).astype(np.int8), draw.random(n) < 0.5
        )
        for n in LENGTHS
    )
    return ProbeCorpus("probe", sequences, len(sequences), skip_first_tokens=skip)


@dataclass
class Recorder:
    """A fold that keeps all it is shown, row by row under (sequence, position)."""

    layers: tuple[int, ...] = ()
    logprobs: bool = False
    fails_in: str = ""
    error: Exception = field(default_factory=lambda: ValueError("broken on purpose"))
    rows: dict[tuple[int, int], dict[str, Any]] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)

    def update(self, block: TokenBlock) -> None:
        self.sizes.append(len(block))
        if self.fails_in == "update":
            raise self.error
        for row, key in enumerate(zip(block.sequence_N.tolist(), block.position_N.tolist(), strict=True)):
            assert key not in self.rows
            self.rows[key] = {
                "token": int(block.token_N[row]),
                "next": int(block.next_N[row]),
                "role": int(block.role_N[row]),
                "template": bool(block.template_N[row]),
                **{
                    (side, layer): getattr(block, side).residual(layer)[row].clone()
                    for side in ("base", "tuned")
                    for layer in self.layers
                },
            }
            if self.logprobs:
                self.rows[key] |= {side: getattr(block, side).logprobs()[row].clone() for side in ("base", "tuned")}

    def finish(self) -> dict[str, pa.Table]:
        if self.fails_in == "finish":
            raise self.error
        return {"seen": pa.table({"n": [len(self.rows)]})}


def recording(recorders: list[Recorder], name: str = "recorder", **options: Any) -> tuple[Method, Settings]:
    """A method whose folds are kept in `recorders`."""

    def start(_context: StreamContext, _settings: Settings) -> Recorder:
        recorder = Recorder(**options)
        if recorder.fails_in == "start":
            raise recorder.error
        recorders.append(recorder)
        return recorder

    needs = BOTH if options.get("logprobs") else frozenset({Need.RESIDUALS})
    return method(name, needs, start=start), Settings()


def method(name: str, needs: frozenset[Need], kind: str = "stream", **how: Callable) -> Method:
    return Method(
        name=name, version="1", kind=kind, needs=needs, settings=Settings, tables=(), reference="", findings=None,
        headline=lambda _tables: {}, **how,
    )  # fmt: skip


@pytest.fixture(scope="module")
def base() -> Subject:
    return Subject.of(model_files.build(), revision="base")


@pytest.fixture(scope="module")
def tuned() -> Subject:
    return Subject.of(model_files.build(seed=1), revision="tuned")


def pair_of(base: Subject, tuned: Subject, name: str = "o", vocab: int = VOCAB) -> ModelPair:
    return ModelPair(base, tuned, model_files.tokenizer(), Pair("m", name), vocab, tuned.revision)


def run(
    pairs: Sequence[ModelPair],
    methods: Sequence[tuple[Method, Settings]],
    probe: ProbeCorpus | None = None,
    **options: Any,
) -> list[MethodResult]:
    return list(paired_pass(pairs, probe or corpus(), methods, **options))


@contextmanager
def counting(module: torch.nn.Module) -> Iterator[list[None]]:
    calls: list[None] = []
    handle = module.register_forward_pre_hook(lambda *_: calls.append(None))
    yield calls
    handle.remove()


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks_module, "VALUES_PER_BLOCK", {"cpu": PER_BLOCK * VOCAB})
    monkeypatch.setattr(blocks_module, "LEAST_BLOCK_ROWS", 1)


# ---- what folds are shown -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens_per_batch", [1, 30, 4096])
@pytest.mark.usefixtures("small_blocks")
def test_every_token_is_shown_once_as_a_plain_forward_of_its_sequence_alone_gives_it(
    base: Subject, tuned: Subject, tokens_per_batch: int
) -> None:
    recorders: list[Recorder] = []
    run([pair_of(base, tuned)], [recording(recorders, layers=(0, 2), logprobs=True)], tokens_per_batch=tokens_per_batch)
    [recorder] = recorders
    assert sorted(recorder.rows) == [(index, position) for index, n in enumerate(LENGTHS) for position in range(n)]
    assert max(recorder.sizes) <= PER_BLOCK
    for index, sequence in enumerate(corpus().sequences):
        rows = [recorder.rows[index, position] for position in range(len(sequence))]
        assert [row["token"] for row in rows] == sequence.token_T.tolist()
        assert [row["next"] for row in rows] == [*sequence.token_T[1:].tolist(), -1]
        assert [row["role"] for row in rows] == sequence.role_T.tolist()
        assert [row["template"] for row in rows] == sequence.template_T.tolist()
        for name, subject in (("base", base), ("tuned", tuned)):
            plain = subject.module(torch.from_numpy(sequence.token_T)[None].long(), output_hidden_states=True)
            expected_NV = plain.logits[0].double().log_softmax(-1)
            torch.testing.assert_close(
                torch.stack([row[name] for row in rows]).double(), expected_NV, atol=2e-5, rtol=1e-5
            )
            states_ND = torch.stack([row[name, 0] for row in rows])
            torch.testing.assert_close(states_ND, plain.hidden_states[1][0], atol=1e-5, rtol=1e-4)


def test_an_adapter_on_the_shared_copy_is_shown_as_peft_alone_gives_it(tmp_path: Path) -> None:
    folder = model_files.save_base(tmp_path / "base")
    adapter = model_files.save_adapter(tmp_path / "adapter", folder)
    module = peft.PeftModel.from_pretrained(tf.AutoModelForCausalLM.from_pretrained(folder), adapter)
    recorders: list[Recorder] = []
    run([pair_of(Subject.of(module), Subject.of(module, "default"))], [recording(recorders, logprobs=True)])
    models = {"base": tf.AutoModelForCausalLM.from_pretrained(folder)}
    models["tuned"] = peft.PeftModel.from_pretrained(tf.AutoModelForCausalLM.from_pretrained(folder), adapter)
    token_T = torch.from_numpy(corpus().sequences[0].token_T)[None].long()
    for name, model in models.items():
        expected_NV = model.eval()(input_ids=token_T).logits[0].detach().double().log_softmax(-1)
        shown_NV = torch.stack([recorders[0].rows[0, position][name] for position in range(LENGTHS[0])])
        torch.testing.assert_close(shown_NV.double(), expected_NV, atol=2e-5, rtol=1e-5)


@pytest.mark.usefixtures("small_blocks")
def test_skipped_first_tokens_are_not_shown_but_stay_in_the_context(base: Subject, tuned: Subject) -> None:
    everything: list[Recorder] = []
    skipping: list[Recorder] = []
    run([pair_of(base, tuned)], [recording(everything, layers=(1,), logprobs=True)])
    [result] = run([pair_of(base, tuned)], [recording(skipping, layers=(1,), logprobs=True)], corpus(skip=2))
    kept = {key: row for key, row in everything[0].rows.items() if key[1] >= 2}
    assert skipping[0].rows.keys() == kept.keys()
    for key, row in skipping[0].rows.items():
        assert row["next"] == kept[key]["next"]
        torch.testing.assert_close(row["tuned"], kept[key]["tuned"], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(row["tuned", 1], kept[key]["tuned", 1], atol=1e-6, rtol=1e-5)
    assert result.cost.n_tokens == len(kept)


def test_only_the_vocabulary_in_common_is_normalised(base: Subject, tuned: Subject) -> None:
    recorders: list[Recorder] = []
    run([pair_of(base, tuned, vocab=VOCAB - 5)], [recording(recorders, logprobs=True)])
    logprobs_NV = torch.stack([row["base"] for row in recorders[0].rows.values()])
    assert logprobs_NV.shape[1] == VOCAB - 5
    torch.testing.assert_close(logprobs_NV.exp().sum(-1), torch.ones(len(logprobs_NV)))


def test_context_describes_pair_and_corpus(base: Subject, tuned: Subject) -> None:
    seen: list[StreamContext] = []
    look = method("look", frozenset(), start=lambda context, _settings: seen.append(context) or Recorder())
    probe = corpus()
    run([pair_of(base, tuned)], [(look, Settings())], probe)
    [context] = seen
    assert (context.base, context.tuned, context.corpus, context.store) == (base, tuned, probe, None)
    assert (context.n_layers, context.d_model, context.vocab_size) == (LAYERS, model_files.WIDTH, VOCAB)
    assert context.token_texts([3, 60]) == ["w3", "w60"]
    assert np.flatnonzero(~context.readable_V).tolist() == [1]


def test_a_model_that_gives_nan_fails_alone_and_says_where(base: Subject, tuned: Subject) -> None:
    broken = Subject.of(model_files.build(seed=2))
    token = int(corpus().sequences[1].token_T[3])
    with torch.no_grad():
        broken.plain.get_input_embeddings().weight[token] = torch.nan
    recorders: list[Recorder] = []
    results = run(
        [pair_of(base, broken, "broken"), pair_of(base, tuned, "sound")], [recording(recorders, layers=(0,), logprobs=True)]
    )
    failed, sound = results
    assert isinstance(failed.error, ModelLoadError)
    assert re.search(r"NaN or infinite values after block \d+ at \d+ token\(s\), first of text \d+, position \d+", str(failed.error))
    assert sound.error is None and len(recorders[1].rows) == sum(LENGTHS)


# ---- what is shared, and what is not run --------------------------------------------------------------------------


def test_blocks_above_the_last_asked_one_are_not_run_unless_logits_are_wanted(base: Subject, tuned: Subject) -> None:
    last, head = base.blocks[-1], base.layout.head
    with counting(base.blocks[0]) as first, counting(last) as deep, counting(head) as heads:
        run([pair_of(base, tuned)], [recording([], layers=(0,)), recording([], "second", layers=(1,))])
    assert (len(first), len(deep), len(heads)) == (1, 0, 0)
    with counting(last) as deep, counting(head) as heads:
        run([pair_of(base, tuned)], [recording([], layers=(0,)), recording([], "second", logprobs=True)])
    assert (len(deep), len(heads)) == (1, 1)


@pytest.mark.usefixtures("small_blocks")
def test_a_shared_base_runs_once_for_all_pairs_and_methods(base: Subject, tuned: Subject) -> None:
    pairs = [
        pair_of(base, tuned, "one"),
        pair_of(base, Subject.of(model_files.build(seed=2)), "two"),
        pair_of(base, base, "same"),
    ]
    n_batches = len(list(corpus().batches(30)))
    recorders: list[Recorder] = []
    with counting(base.blocks[0]) as forwards, counting(base.layout.head) as heads, counting(tuned.blocks[0]) as others:
        run(
            pairs,
            [recording(recorders, layers=(1,), logprobs=True), recording([], "second", logprobs=True)],
            tokens_per_batch=30,
        )
    assert len(forwards) == len(others) == n_batches
    assert len(heads) == len(recorders[0].sizes)
    alone: list[Recorder] = []
    run(pairs[1:2], [recording(alone, layers=(1,), logprobs=True)])
    for key, row in alone[0].rows.items():
        torch.testing.assert_close(recorders[1].rows[key]["tuned"], row["tuned"], atol=1e-5, rtol=1e-5)
    assert all(torch.equal(row["base"], row["tuned"]) for row in recorders[2].rows.values())


def test_forward_time_is_told_apart_from_the_methods_own(base: Subject, tuned: Subject) -> None:
    [result] = run([pair_of(base, tuned)], [recording([], logprobs=True)])
    assert result.cost.shared_s > 0
    assert result.cost.compute_s > 0
    assert (result.cost.n_sequences, result.cost.n_tokens) == (len(LENGTHS), sum(LENGTHS))


# ---- failures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["start", "update", "finish"])
@pytest.mark.parametrize(
    "error",
    [ValueError("broken"), NotComputableError("broken"), RuntimeError("broken"), KeyError("broken"), OSError("broken")],
    ids=lambda error: type(error).__name__,
)
def test_a_method_that_fails_ends_alone_with_its_error(
    base: Subject, tuned: Subject, where: str, error: Exception
) -> None:
    recorders: list[Recorder] = []
    broken = recording(recorders, "broken", layers=(0,), fails_in=where, error=error)
    results = run([pair_of(base, tuned)], [broken, recording(recorders, "sound", layers=(0,))], tokens_per_batch=30)
    failed, sound = results
    assert (failed.method.name, failed.error, failed.tables) == ("broken", error, {})
    assert sound.error is None
    assert sound.tables["seen"]["n"].to_pylist() == [sum(LENGTHS)]
    if where == "update":
        assert len(recorders[0].sizes) == 1


def test_a_failure_on_one_pair_leaves_the_method_on_the_others(base: Subject, tuned: Subject) -> None:
    def start(context: StreamContext, _settings: Settings) -> Recorder:
        return Recorder(fails_in="update" if context.tuned is tuned else "")

    picky = method("picky", frozenset({Need.RESIDUALS}), start=start)
    failed, sound = run([pair_of(base, tuned, "one"), pair_of(base, base, "two")], [(picky, Settings())])
    assert (failed.pair, type(failed.error)) == (Pair("m", "one"), ValueError)
    assert (sound.pair, sound.error) == (Pair("m", "two"), None)


def test_a_programming_error_is_not_taken_for_a_methods_failure(base: Subject, tuned: Subject) -> None:
    with pytest.raises(TypeError, match="bug"):
        run([pair_of(base, tuned)], [recording([], layers=(0,), fails_in="update", error=TypeError("bug"))])


@pytest.mark.parametrize("error", [None, CorpusError("no such prompt")])
def test_a_method_of_another_kind_ends_alone_too(base: Subject, tuned: Subject, error: Exception | None) -> None:
    def work(inputs: Inputs, _settings: Settings) -> dict[str, pa.Table]:
        if error:
            raise error
        return {"seen": pa.table({"n": [inputs[Need.MODELS]]})}

    live = method("live", frozenset({Need.MODELS}), kind="live", run=work)
    result = timed_run(pair_of(base, tuned), live, Settings(), Inputs(live, {Need.MODELS: lambda: 7}))
    assert result.error is error
    assert [table.to_pylist() for table in result.tables.values()] == ([] if error else [[{"n": 7}]])
    assert result.cost.compute_s >= 0


# ---- layers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "n_layers", "picked"),
    [
        (None, 3, (0, 1, 2)),
        ((), 3, ()),
        ((2, 0, 2), 3, (0, 2)),
        ((0.0, 0.5, 1.0), 3, (0, 1, 2)),
        ((0.5,), 4, (1,)),
        ((0.25, 0.5, 0.75), 26, (6, 12, 18)),
        ((1, 1.0), 5, (1, 4)),
        ((0.999,), 11, (9,)),
    ],
)
def test_layers_by_number_or_by_depth(wanted: tuple | None, n_layers: int, picked: tuple[int, ...]) -> None:
    assert pick_layers(wanted, n_layers) == picked


@pytest.mark.parametrize("layer", [3, -1, 1.5])
def test_layers_beyond_the_model_are_refused(layer: float) -> None:
    with pytest.raises(UndeclaredNeedError, match=r"asked of a model with 3 blocks \(0 … 2\)"):
        pick_layers((layer,), 3)


# ---- failures at run time, and what stays in memory ---------------------------------------------------------------


@contextmanager
def out_of_memory(module: torch.nn.Module, from_call: int = 0) -> Iterator[None]:
    calls = itertools.count()

    def fail(*_: Any) -> None:
        if next(calls) >= from_call:
            raise RuntimeError("out of memory")

    handle = module.register_forward_pre_hook(fail)
    yield
    handle.remove()


@pytest.mark.parametrize("place", ["block", "head"])
def test_a_finetune_whose_forward_or_head_fails_does_so_alone_in_its_cohort(base: Subject, tuned: Subject, place: str) -> None:
    other = Subject.of(model_files.build(seed=2, tie_word_embeddings=False), revision="other")
    broken = other.blocks[0] if place == "block" else other.layout.head
    methods = [get_method("kl"), get_method("norm_diff")]
    asked = [(each, each.settings()) for each in methods]
    pairs = [pair_of(base, tuned, "sound"), pair_of(base, other, "broken")]
    with out_of_memory(broken, from_call=1):
        results = list(paired_pass(pairs, corpus(), asked, tokens_per_batch=24))
    errors = {(each.pair.organism, each.method.name): each.error for each in results}
    assert errors["sound", "kl"] is None
    assert errors["sound", "norm_diff"] is None
    assert "out of memory" in str(errors["broken", "kl"])
    assert (errors["broken", "norm_diff"] is None) == (place == "head")
    alone = {each.method.name: each.tables for each in paired_pass(pairs[:1], corpus(), asked, tokens_per_batch=24)}
    for each in results:
        if each.pair.organism == "sound":
            assert each.tables == alone[each.method.name]


def test_a_base_that_fails_ends_all_its_pairs_with_the_reason(base: Subject, tuned: Subject) -> None:
    kl = get_method("kl")
    with out_of_memory(base.blocks[0], from_call=2):
        results = list(paired_pass([pair_of(base, tuned)], corpus(), [(kl, kl.settings())], tokens_per_batch=24))
    assert ["out of memory" in str(each.error) for each in results] == [True]


@pytest.mark.usefixtures("small_blocks")
def test_a_finetune_with_fewer_embeddings_than_the_corpus_has_ids_is_named(base: Subject, tuned: Subject) -> None:
    largest = corpus().largest_id
    assert largest == max(sequence.token_T.max() for sequence in corpus().sequences)
    small = Subject.of(model_files.build(vocab_size=largest))
    pairs = [pair_of(base, small, "small", largest), pair_of(base, tuned)]
    refused, shown = run(pairs, [recording([], layers=(0,))])
    assert shown.error is None
    assert isinstance(refused.error, CorpusError)
    assert f"has token id {largest}, but the tuned model of small__m__default" in str(refused.error)


def test_no_tensor_over_tokens_and_vocabulary_outlives_its_block(base: Subject, tuned: Subject) -> None:
    """The toolkit held all logits of all samples: 159 GB per model with its defaults."""
    seen: list[weakref.ref] = []

    class Watcher(Recorder):
        def update(self, block: TokenBlock) -> None:
            gc.collect()
            alive = {id(storage) for storage in (each() for each in seen) if storage is not None}
            assert len(alive) <= 2, "only the logits of this block's two sides may be alive"
            for side in (block.base, block.tuned):
                seen.append(weakref.ref(side.logits().untyped_storage()))

    watching = method("watcher", BOTH, start=lambda *_: Watcher()), Settings()
    [result] = paired_pass([pair_of(base, tuned)], corpus(), [watching], tokens_per_batch=24)
    assert result.error is None, result.error
    assert len(seen) > 4


def test_a_batch_takes_the_room_of_the_one_before(base: Subject, tuned: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Residuals are written over those of the last batch, whose logits are gone by then."""
    logits: list[weakref.ref] = []
    places: list[set[int]] = []
    forward = paired_pass_module._forward_all

    def watched(*given: Any) -> Any:
        gc.collect()
        assert [each for each in (ref() for ref in logits) if each is not None] == []
        going, states = forward(*given)
        places.append({state_ND.untyped_storage().data_ptr() for layers in states.values() for state_ND in layers.values()})
        return going, states

    class Watcher(Recorder):
        def update(self, block: TokenBlock) -> None:
            logits.extend(weakref.ref(side.logits().untyped_storage()) for side in (block.base, block.tuned))

    monkeypatch.setattr(paired_pass_module, "_forward_all", watched)
    watching = method("watcher", BOTH, start=lambda *_: Watcher(layers=(0, 1))), Settings()
    [result] = paired_pass([pair_of(base, tuned)], corpus(skip=2), [watching], tokens_per_batch=24)
    assert result.error is None, result.error
    assert len(places) > 1
    assert all(each == places[0] for each in places)
    assert len(places[0]) == 2 * len({0, 1, base.n_layers - 1})


def test_a_head_that_fails_is_asked_once(base: Subject, tuned: Subject, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Subject):
        def readout(self, residual_ND: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("the head broke")

    broken = Broken(tuned.module, revision="broken")
    results = list(paired_pass([pair_of(base, broken)], corpus(), [recording([], logprobs=True)], tokens_per_batch=12))
    assert [str(result.error) for result in results] == ["the head broke"]
    assert caplog.text.count("RuntimeError: the head broke") == 1


def test_a_corpus_of_which_nothing_is_seen_is_refused(base: Subject, tuned: Subject) -> None:
    with pytest.raises(CorpusError, match=r"'probe' shows no token: all are skipped"):
        list(paired_pass([pair_of(base, tuned)], corpus(skip=12), [recording([])]))


def test_toolkit_defect_kl_needs_an_activation_cache(base: Subject, tuned: Subject) -> None:
    """Run alone it loaded both models and then failed on a missing file."""
    kl = get_method("kl")
    [result] = paired_pass([pair_of(base, tuned)], corpus(), [(kl, kl.settings())], store=None)
    assert result.error is None
    assert result.tables["kl_tokens"].num_rows == sum(LENGTHS)


def test_many_subjects_share_a_batch_of_fewer_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """All subjects' residuals of a batch are alive together, so their number divides the tokens of a batch."""
    base, *tuned = (Subject.of(model_files.build(seed=seed)) for seed in range(4))
    pairs = [ModelPair(base, side, None, Pair("m", f"o{place}"), VOCAB) for place, side in enumerate(tuned)]
    bytes_of_a_token = 2 * base.d_model * 4
    monkeypatch.setattr(paired_pass_module, "RESIDUAL_BYTES", 48 * bytes_of_a_token)
    assert affordable_tokens(pairs[:1], n_layers=2) == 24
    assert affordable_tokens(pairs, n_layers=2) == 12
    full = Subject.of(model_files.build(seed=9).double())
    assert affordable_tokens([replace(pairs[0], tuned=full)], n_layers=2) == 16, "each subject in its own number format"
    recorders: list[Recorder] = []
    list(paired_pass(pairs, corpus(), [recording(recorders, layers=(0, 1))]))
    assert max(recorders[0].sizes) <= 12
    assert len(recorders[0].rows) == sum(LENGTHS)
