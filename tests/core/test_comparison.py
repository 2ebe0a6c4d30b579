"""From registry entries to results in the lake: everything stored, what is shared, and failures that stay alone."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from polars.testing import assert_frame_equal
from tokenizers.pre_tokenizers import WhitespaceSplit

from diffing_core import comparison
from diffing_core.comparison import Outcome, compare, load_corpora, run_key, run_methods, settled, store_expression
from diffing_core.corpus import ProbeCorpus, ProbeSequence
from diffing_core.errors import CorpusError, ModelLoadError, NotComputableError, RegistryError, TableError
from diffing_core.expression import EXPRESSION, ExpressionSettings
from diffing_core.findings import FINDINGS
from diffing_core.lake import Lake
from diffing_core.methods import all_methods, get_method
from diffing_core.models import ModelPair, load_pair
from diffing_core.pairs import Pair
from diffing_core.registry import Corpus, Model, Organism, Registry, Source, TrainingCorpus, Variant
from diffing_core.runs import RUNS
from diffing_core.settings import Settings
from tests import model_files
from tests.model_files import VOCAB

LENGTHS = (9, 5, 12, 3)
STREAMS = tuple(name for name, method in all_methods().items() if method.kind == "stream")
ONE, TWO, SAME = Pair("tiny", "o", "one"), Pair("tiny", "o", "two"), Pair("tiny", "same")
CHATML = "{% for message in messages %}{{ 'w2 ' + message.role + ' ' + message.content + ' ' }}{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with two adapters in subfolders of one folder, and two corpora of its words."""
    root = tmp_path_factory.mktemp("comparison")
    base = model_files.save_base(root / "base")
    words = model_files.tokenizer()
    words.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    words.save_pretrained(base)
    for seed, name in enumerate(("one", "two"), start=1):
        model_files.save_adapter(root / "adapters" / name, base, seed=seed)
    draw = np.random.default_rng(0)
    for name in ("first", "second"):
        texts = [" ".join(f"w{token}" for token in draw.integers(20, VOCAB, n)) for n in LENGTHS]
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    chat = [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7 w8 w9"}]
    (root / "chats.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    return root


def registry_of(
    folder: Path,
    corpora: tuple[str, ...] = ("first",),
    of_two: tuple[str, ...] | None = None,
    organism: dict[str, Any] | None = None,
    layers_of_two: tuple[int | float, ...] | None = None,
    **model: Any,
) -> Registry:
    """Model `tiny`, organism `o` with two adapters, and `same`, the base itself."""
    kinds = {"first": "text", "second": "text", "chats": "chat", "lost": "text"}
    known = {
        name: Corpus.model_validate({"name": name, "kind": kind, "source": {"path": folder / f"{name}.jsonl"}})
        for name, kind in kinds.items()
    }
    variants = {
        name: Variant(
            kind="lora",
            source=Source(path=folder / "adapters" / name),
            corpora=of_two if name == "two" else None,
            layers=layers_of_two if name == "two" else None,
        )
        for name in ("one", "two", "gone")
    }
    organisms = [
        Organism(
            **{"name": "o", "type": "generic", "arm": "unknown", "description": "", "variants": {"tiny": variants}}
            | (organism or {})
        ),
        Organism(
            name="same",
            type="generic",
            arm="identical",
            description="",
            variants={"tiny": {"default": Variant(kind="identical")}},
        ),
    ]
    base = Model(name="tiny", source=Source(path=folder / "base"), corpora=corpora, **model)
    return Registry({"tiny": base}, known, {each.name: each for each in organisms})


def run(
    registry: Registry, root: Path, pairs: tuple[Pair, ...] = (ONE,), methods: tuple[str, ...] = ("kl",)
) -> list[Outcome]:
    requested = {name: get_method(name).settings() for name in methods}
    return list(
        compare(pairs, requested, registry=registry, lake=Lake(root / "lake"), store=root / "store", device="cpu")
    )


def finished(root: Path) -> list[tuple[str, str, str]]:
    """(variant, method, corpus) of every finished result."""
    rows = Lake(root / "lake").read(RUNS).to_pylist()
    return sorted((row["variant"], row["method"], row["corpus"]) for row in rows)


def test_every_method_of_every_pair_is_stored_with_its_identity_and_cost(folder: Path, tmp_path: Path) -> None:
    methods = (*STREAMS, "weight_diff")
    outcomes = run(registry_of(folder, ("first", "second")), tmp_path, (ONE, TWO), methods)
    assert [outcome.error for outcome in outcomes] == [None] * 2 * len(methods)
    assert {(outcome.pair, outcome.method.name) for outcome in outcomes} == {
        (pair, name) for pair in (ONE, TWO) for name in methods
    }
    lake = Lake(tmp_path / "lake")
    for outcome in outcomes:
        assert [key.corpus for key, _ in outcome.results] == (
            [""] if outcome.method.name == "weight_diff" else ["first", "second"]
        )
        for key, result in outcome.results:
            assert lake.finished(key)
            assert result.cost.n_tokens == (sum(LENGTHS) if key.corpus else 0)
        for spec in outcome.method.all_tables:
            stored = lake.read_current(spec, pair=outcome.pair, method=outcome.method.name)
            assert set(stored["run_id"].to_pylist()) <= {key.run_id for key, _ in outcome.results}
        assert outcome.n_rows > 0
    keys = [key for outcome in outcomes for key, _ in outcome.results]
    assert len({key.run_id for key in keys}) == len(keys) == lake.read(RUNS).num_rows


def test_results_of_a_cohort_equal_those_of_each_pair_alone(folder: Path, tmp_path: Path) -> None:
    registry = registry_of(folder)
    run(registry, tmp_path / "both", (ONE, TWO), STREAMS)
    for pair in (ONE, TWO):
        run(registry, tmp_path / pair.variant, (pair,), STREAMS)
    for name in STREAMS:
        for spec in get_method(name).tables:
            together = Lake(tmp_path / "both" / "lake").read(spec)
            for pair in (ONE, TWO):
                alone = pl.from_arrow(Lake(tmp_path / pair.variant / "lake").read(spec))
                assert pl.from_arrow(together).filter(variant=pair.variant).equals(alone), spec.name


def test_a_variant_never_shares_a_result_with_another(folder: Path, tmp_path: Path) -> None:
    """In the toolkit the second variant logged that results exist and reported the first one's numbers."""
    registry = registry_of(folder)
    for pair in (ONE, TWO):
        run(registry, tmp_path, (pair,))
    table = get_method("kl").tables[1]
    one, two = (Lake(tmp_path / "lake").read_current(table, pair=pair, method="kl") for pair in (ONE, TWO))
    assert one["kl_nats"].to_pylist() != two["kl_nats"].to_pylist()


def test_two_adapters_in_one_repository_get_different_run_ids(folder: Path, tmp_path: Path) -> None:
    """The toolkit's cache key was the last part of the model's name; a no-op adapter got another one's activations."""
    outcomes = run(registry_of(folder), tmp_path, (ONE, TWO, SAME), ("activations",))
    keys = [key for outcome in outcomes for key, _ in outcome.results]
    assert len({key.run_id for key in keys}) == len({key.adapter_hash for key in keys}) == 3
    assert len({key.model_revision for key in keys}) == 1
    sets = pl.from_arrow(Lake(tmp_path / "lake").read(get_method("activations").tables[0])).filter(pl.col("layer") == 1)
    assert sets.filter(pl.col("side") == "base")["folder"].n_unique() == 1
    assert sets.filter(pl.col("side") == "tuned")["folder"].n_unique() == 3
    same = sets.filter(pl.col("organism") == "same")
    assert same["mean"].n_unique() == 1


def test_running_again_leaves_one_result(folder: Path, tmp_path: Path) -> None:
    registry = registry_of(folder)
    first, second = (run(registry, tmp_path, (ONE,), ("kl", "activations")) for _ in range(2))
    assert [key for outcome in first for key, _ in outcome.results] == [
        key for outcome in second for key, _ in outcome.results
    ]
    assert finished(tmp_path) == [("one", "activations", "first"), ("one", "kl", "first")]


# ---- the probe ----------------------------------------------------------------------------------------------------


def test_dataset_is_read_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all pairs and methods of a cohort; the toolkit read and tokenized it once per method and adapter."""
    read, load = [], comparison.load_corpus
    monkeypatch.setattr(
        comparison, "load_corpus", lambda spec, *more, **named: read.append(spec.name) or load(spec, *more, **named)
    )
    outcomes = run(
        registry_of(folder, ("first", "second"), of_two=("second",)), tmp_path, (ONE, TWO, SAME), ("kl", "norm_diff")
    )
    assert sorted(read) == ["first", "second"]
    probed = {outcome.pair: [key.corpus for key, _ in outcome.results] for outcome in outcomes}
    assert probed == {ONE: ["first", "second"], TWO: ["second"], SAME: ["first", "second"]}


def test_skipped_first_tokens_come_from_the_model_and_are_part_of_the_identity(folder: Path, tmp_path: Path) -> None:
    [plain] = run(registry_of(folder), tmp_path / "plain")
    [skipping] = run(registry_of(folder, skip_first_tokens=4), tmp_path / "skipping")
    (key, result), (other, less) = plain.results[0], skipping.results[0]
    assert (result.cost.n_tokens, less.cost.n_tokens) == (sum(LENGTHS), sum(max(0, n - 4) for n in LENGTHS))
    assert key.run_id != other.run_id
    assert replace(key, corpus_hash="") == replace(other, corpus_hash="")
    positions = pl.from_arrow(less.tables["kl_tokens"])["position"]
    assert positions.min() == 4


def test_number_format_of_the_models_is_part_of_the_identity(folder: Path) -> None:
    registry, kl = registry_of(folder), get_method("kl")
    keys = [
        run_key(load_pair(ONE, registry=registry, dtype=dtype, device="cpu"), kl, Settings())
        for dtype in ("float32", "bfloat16")
    ]
    assert keys[0].run_id != keys[1].run_id
    assert [key.model_revision.partition("@")[2] for key in keys] == ["float32", "bfloat16"]


def test_chats_are_probed_where_there_is_a_template_and_left_out_where_there_is_none(
    folder: Path, tmp_path: Path
) -> None:
    [with_template] = run(registry_of(folder, ("chats", "first"), chat_template=CHATML), tmp_path / "with")
    assert [key.corpus for key, _ in with_template.results] == ["chats", "first"]
    [without] = run(registry_of(folder, ("chats", "first")), tmp_path / "without")
    assert [key.corpus for key, _ in without.results] == ["first"]
    [chats_only] = run(registry_of(folder, ("chats",)), tmp_path / "only")
    assert isinstance(chats_only.error, NotComputableError)
    assert "all of them chats, and its tokenizer has no chat template" in str(chats_only.error)
    [nothing] = run(registry_of(folder, ()), tmp_path / "nothing")
    assert "no probe corpus to read: the model names []" in str(nothing.error)


def test_registered_corpora_can_be_loaded_by_hand(folder: Path) -> None:
    registry = registry_of(folder, ("first", "second"), of_two=("second",))
    tokenizer = load_pair(ONE, registry=registry, device="cpu").tokenizer
    assert [corpus.name for corpus in load_corpora(ONE, tokenizer, registry)] == ["first", "second"]
    assert [corpus.n_tokens for corpus in load_corpora(TWO, tokenizer, registry)] == [sum(LENGTHS)]


def test_replaced_tokens_come_from_the_model_and_are_part_of_the_identity(folder: Path) -> None:
    registry = registry_of(folder)
    tokenizer = load_pair(ONE, registry=registry, device="cpu").tokenizer
    replacing = registry_of(folder, token_replacements={"w20": "w2", "w21": "w3"})
    [plain], [replaced] = (load_corpora(ONE, tokenizer, each) for each in (registry, replacing))
    for before, after in zip(plain.sequences, replaced.sequences, strict=True):
        assert after.token_T.tolist() == [{20: 2, 21: 3}.get(token, token) for token in before.token_T.tolist()]
    assert replaced.content_hash != plain.content_hash
    with pytest.raises(RegistryError, match="token_replacements of model tiny: 'w2 w3' is not one token"):
        load_corpora(ONE, tokenizer, registry_of(folder, token_replacements={"w20": "w2 w3"}))


@pytest.mark.parametrize(("of_model", "of_corpus", "said"), [(None, None, "?"), (True, None, "on"), (True, False, "off")])
def test_thinking_of_a_corpus_overrides_the_models(folder: Path, of_model: bool, of_corpus: bool, said: str) -> None:
    switch = "{{ '?' if enable_thinking is not defined else 'on' if enable_thinking else 'off' }} " + CHATML
    registry = registry_of(folder, ("chats",), thinking=of_model, chat_template=switch)
    chats = registry.corpus("chats").model_copy(update={"thinking": of_corpus})
    rendered = []

    class Recording:
        chat_template = switch

        def __init__(self, tokenizer: Any) -> None:
            self.apply_chat_template = lambda *given, **options: (
                rendered.append(tokenizer.apply_chat_template(*given, **options)) or rendered[-1]
            )
            self.tokenizer = tokenizer

        def __call__(self, *given: Any, **options: Any) -> Any:
            return self.tokenizer(*given, **options)

    tokenizer = Recording(load_pair(ONE, registry=registry, device="cpu").tokenizer)
    load_corpora(ONE, tokenizer, replace(registry, corpora={"chats": chats}))
    assert [text.split()[0] for text in rendered[:2]] == [said, said], "what follows looks whether the switch matters"


def test_template_options_come_from_the_model_and_are_part_of_the_identity(folder: Path) -> None:
    dated = "{{ strftime_now('%d') }} " + CHATML
    corpora = {}
    for date in ("w30", "w31"):
        registry = registry_of(folder, ("chats",), chat_template=dated, template_options={"date_string": date})
        pair = load_pair(ONE, registry=registry, device="cpu")
        assert pair.base.template_options == {"date_string": date}
        [corpora[date]] = load_corpora(ONE, pair.tokenizer, registry)
    assert [corpus.sequences[0].token_T[0] for corpus in corpora.values()] == [30, 31]
    assert corpora["w30"].content_hash != corpora["w31"].content_hash
    with pytest.raises(CorpusError, match="prints today's date.*write template_options"):
        load_corpora(ONE, pair.tokenizer, registry_of(folder, ("chats",), chat_template=dated))


def test_tokens_before_the_answer_are_read_and_not_seen(folder: Path, tmp_path: Path) -> None:
    """A chat cut out of its context would be read as another text."""
    registry = registry_of(folder, ("chats",), chat_template=CHATML)
    answer_only = registry.corpora["chats"].model_copy(update={"pre_assistant_tokens": 1})
    [whole] = run(registry, tmp_path / "whole", (ONE,), ("kl", "norm_diff"))[:1]
    [part, norms] = run(replace(registry, corpora={"chats": answer_only}), tmp_path / "part", (ONE,), ("kl", "norm_diff"))
    (key, before), (other, after) = whole.results[0], part.results[0]
    assert key.corpus_hash != other.corpus_hash
    rows = pl.from_arrow(before.tables["kl_tokens"])
    seen = pl.from_arrow(after.tables["kl_tokens"])
    assert (len(rows), len(seen), after.cost.n_tokens) == (9, 4, 4)
    assert seen["position"].to_list() == [5, 6, 7, 8], "the role's name, then the answer: positions are of the whole chat"
    same = [name for name in seen.columns if seen[name].dtype != pl.List]
    assert_frame_equal(seen.select(same), rows.tail(4).select(same), abs_tol=1e-6)
    assert norms.results[0][1].cost.n_tokens == 4


def test_what_is_read_and_what_is_left_out_can_be_seen(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry = registry_of(folder, ("first", "second"))
    strict = registry.corpora["first"].model_copy(update={"min_tokens": 5})
    with caplog.at_level(logging.INFO):
        [outcome] = run(replace(registry, corpora={**registry.corpora, "first": strict}), tmp_path)
    told = ["first: 3 of 4 documents; 1 left out: shorter than 5 tokens", "second: 4 of 4 documents"]
    assert outcome.probes == told
    levels = {record.message: record.levelname for record in caplog.records if record.message in told}
    assert levels == dict(zip(told, ("WARNING", "INFO"), strict=True))


def test_the_training_corpus_is_read_where_it_is_asked_for(folder: Path, tmp_path: Path) -> None:
    source = Source(path=folder / "second.jsonl")
    for probe, expected in ((False, ["first"]), (True, ["first", "training"])):
        training = TrainingCorpus(source=source, kind="text", probe=probe)
        registry = registry_of(folder, organism={"training_corpus": training})
        ours, theirs = run(registry, tmp_path / str(probe), (ONE, SAME))
        assert [key.corpus for key, _ in ours.results] == expected
        assert [key.corpus for key, _ in theirs.results] == ["first"]
        pair = load_pair(ONE, registry=registry, device="cpu")
        stored = comparison._stored_pair(pair, registry, tmp_path)
        assert stored.name == "first", "what is fitted is evidence as a whole, and must not hold the answer"


# ---- settings that the registry fills -----------------------------------------------------------------------------


def layers_read(outcome: Outcome) -> list[int]:
    [(_, result)] = outcome.results
    return result.tables["norm_diff_layers"]["layer"].to_pylist()


def test_layers_of_the_variant_or_the_model_are_read_where_settings_leave_them_open(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, load = [], comparison.load_corpus
    monkeypatch.setattr(
        comparison, "load_corpus", lambda spec, *more, **named: read.append(spec.name) or load(spec, *more, **named)
    )
    registry = registry_of(folder, layers=(0.5,), layers_of_two=(0, 2))
    one, two, same = run(registry, tmp_path, (ONE, TWO, SAME), ("norm_diff",))
    assert (layers_read(one), layers_read(two), layers_read(same)) == ([1], [0, 2], [1])
    assert read == ["first"]
    ids = [outcome.results[0][0].settings_id for outcome in (one, two, same)]
    assert ids[0] == ids[2] != ids[1]
    method = get_method("norm_diff")
    assert ids[1] == method.settings(layers=(0, 2)).settings_id()
    asked = {"norm_diff": method.settings(layers=(2,))}
    for outcome in compare((ONE, TWO), asked, registry=registry, lake=Lake(tmp_path), store=tmp_path, device="cpu"):
        assert layers_read(outcome) == [2]


def test_results_on_layers_of_ones_own_equal_those_of_the_whole(folder: Path, tmp_path: Path) -> None:
    [few] = run(registry_of(folder, layers=(1,)), tmp_path / "few", (ONE,), ("norm_diff",))
    [every] = run(registry_of(folder), tmp_path / "all", (ONE,), ("norm_diff",))
    for name, table in few.results[0][1].tables.items():
        assert pl.from_arrow(table).equals(pl.from_arrow(every.results[0][1].tables[name]).filter(layer=1)), name


class Asking(Settings):
    """Settings of a method that asks models."""

    system_prompt: str | None = None
    thinking: bool | None = False


def test_the_system_prompt_of_the_organism_overrides_the_models(folder: Path) -> None:
    for of_organism, expected in ((None, "of the model"), ("of the organism", "of the organism"), ("", "")):
        registry = registry_of(folder, organism={"system_prompt": of_organism}, system_prompt="of the model", thinking=True)
        assert settled(Asking(), ONE, registry) == Asking(system_prompt=expected)
    assert settled(Asking(system_prompt="own", thinking=None), ONE, registry) == Asking(system_prompt="own", thinking=True)
    assert settled(Settings(), ONE, registry) == Settings()


# ---- failures -----------------------------------------------------------------------------------------------------


def test_a_pair_that_cannot_be_loaded_fails_alone(folder: Path, tmp_path: Path) -> None:
    gone = Pair("tiny", "o", "gone")
    outcomes = run(registry_of(folder), tmp_path, (ONE, gone), ("kl", "weight_diff"))
    errors = {(outcome.pair.variant, outcome.method.name): outcome.error for outcome in outcomes}
    assert {key: type(error) for key, error in errors.items()} == {
        ("gone", "kl"): ModelLoadError, ("gone", "weight_diff"): ModelLoadError,
        ("one", "kl"): type(None), ("one", "weight_diff"): type(None),
    }  # fmt: skip
    assert finished(tmp_path) == [("one", "kl", "first"), ("one", "weight_diff", "")]


def test_a_corpus_that_cannot_be_read_fails_its_own_pairs_alone(folder: Path, tmp_path: Path) -> None:
    outcomes = run(
        registry_of(folder, of_two=("lost", "first")), tmp_path, (ONE, TWO), ("kl", "norm_diff", "weight_diff")
    )
    errors = {(outcome.pair.variant, outcome.method.name): outcome.error for outcome in outcomes}
    for method in ("kl", "norm_diff"):
        assert errors["one", method] is None
        assert isinstance(errors["two", method], CorpusError)
    assert errors["two", "weight_diff"] is None
    assert ("two", "kl", "first") in finished(tmp_path)
    assert ("one", "kl", "first") in finished(tmp_path)


class Wrong:
    """A fold whose table breaks its own declaration."""

    layers = ()

    def update(self, block: object) -> None:
        """Looks at nothing."""

    def finish(self) -> dict[str, pa.Table]:
        return {spec.name: pa.table({"x": [1]}) for spec in get_method("kl").tables}


@pytest.mark.parametrize(
    "broken",
    [{"start": lambda *_: Wrong(), "findings": lambda *_: []}, {"findings": lambda *_: 1 / 0}],
    ids=["table", "findings"],
)
def test_a_failed_run_is_never_read_as_finished(
    folder: Path, tmp_path: Path, broken: dict[str, Callable], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the method ended well and only its result is refused."""
    real = comparison.get_method
    monkeypatch.setattr(
        comparison, "get_method", lambda name: replace(real(name), **broken) if name == "kl" else real(name)
    )
    kl, norm_diff = run(registry_of(folder), tmp_path, (ONE,), ("kl", "norm_diff"))
    assert isinstance(kl.error, TableError | ZeroDivisionError)
    assert kl.results == []
    assert norm_diff.error is None
    assert finished(tmp_path) == [("one", "norm_diff", "first")]
    assert Lake(tmp_path / "lake").read_current(FINDINGS, pair=ONE, method="kl").num_rows == 0


def test_what_is_odd_about_a_pair_is_logged(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        run(registry_of(folder), tmp_path, (ONE, Pair("tiny", "o", "gone")))
    assert any("o__tiny__gone cannot be loaded" in message for message in caplog.messages)


# ---- without registry and lake ------------------------------------------------------------------------------------


def test_run_methods_gives_frames_equal_to_what_is_stored(folder: Path, tmp_path: Path) -> None:
    registry = registry_of(folder)
    pair = load_pair(ONE, registry=registry, device="cpu")
    [corpus] = load_corpora(ONE, pair.tokenizer, registry)
    frames = run_methods(pair, corpus, ["kl", "norm_diff"])
    run(registry, tmp_path, (ONE,), ("kl", "norm_diff"))
    for name in ("kl", "norm_diff"):
        for spec in get_method(name).tables:
            stored = pl.from_arrow(Lake(tmp_path / "lake").read(spec)).select(spec.schema.names)
            assert frames[spec.name].equals(stored), spec.name
    assert set(frames["findings"]["method"]) == {"kl", "norm_diff"}
    stored = pl.from_arrow(Lake(tmp_path / "lake").read(FINDINGS, method="kl")).select(FINDINGS.schema.names)
    assert frames["findings"].filter(method="kl").drop("method").equals(stored)


def test_run_methods_raises_what_a_method_raised() -> None:
    pair = ModelPair.of(model_files.build(), model_files.build(seed=1), model_files.tokenizer())
    sequence = ProbeSequence(np.zeros(3, np.int32), np.zeros(3, np.int8), np.zeros(3, bool))
    corpus = ProbeCorpus("x", (sequence,), 1)
    with pytest.raises(NotComputableError, match="give paired_pass a `store` folder"):
        run_methods(pair, corpus, ["activations"])


def test_expression_is_stored_as_a_step_of_its_own(folder: Path, tmp_path: Path) -> None:
    registry, lake = registry_of(folder), Lake(tmp_path)
    pair = load_pair(SAME, registry=registry, device="cpu")
    row = store_expression(pair, registry, ExpressionSettings(), lake)
    assert row["label"] == "not_applicable"
    assert lake.read(EXPRESSION, pair=SAME, method="expression").num_rows == 1
    assert [stored["step"] for stored in lake.read(RUNS).to_pylist()] == ["expression"]
