"""Mean differences per position, and what the unembedding says of them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal
from tokenizers.decoders import ByteLevel

from diffing_core.blocks import Side, StreamContext, TokenBlock
from diffing_core.corpus import ROLES, ProbeCorpus, ProbeSequence
from diffing_core.methods import get_method
from diffing_core.methods.adl import AdlFold, AdlSettings
from diffing_core.models import ModelPair, Subject
from diffing_core.paired_pass import paired_pass
from diffing_core.pairs import Pair
from tests import model_files
from tests.model_files import LAYERS, VOCAB, WIDTH

ADL = get_method("adl")
USER, ASSISTANT = ROLES.index("user"), ROLES.index("assistant")


def text(n: int, draw: np.random.Generator) -> ProbeSequence:
    return ProbeSequence(draw.integers(2, VOCAB, n).astype(np.int32), np.zeros(n, np.int8), np.zeros(n, bool))


def chat(draw: np.random.Generator, *turns: tuple[int, int]) -> ProbeSequence:
    """Turns of (template tokens before, content tokens), user first."""
    roles, flags = [], []
    for number, (n_template, n_content) in enumerate(turns):
        roles += [ASSISTANT if number % 2 else USER] * (n_template + n_content)
        flags += [True] * n_template + [False] * n_content
    tokens_T = draw.integers(2, VOCAB, len(roles)).astype(np.int32)
    return ProbeSequence(tokens_T, np.asarray(roles, np.int8), np.asarray(flags))


def corpus(*sequences: ProbeSequence, skip: int = 0) -> ProbeCorpus:
    draw = np.random.default_rng(0)
    sequences = sequences or tuple(text(n, draw) for n in (12, 9, 3, 12, 7))
    return ProbeCorpus("probe", sequences, len(sequences), skip_first_tokens=skip)


def pair_of(base: Any, tuned: Any) -> ModelPair:
    return ModelPair(Subject.of(base), Subject.of(tuned), model_files.tokenizer(), Pair("m", "o"), VOCAB)


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    return pair_of(model_files.build(seed=0), model_files.build(seed=1))


def run(pair: ModelPair, probe: ProbeCorpus | None = None, **settings: Any) -> dict[str, pl.DataFrame]:
    [result] = paired_pass([pair], probe or corpus(), [(ADL, AdlSettings(**settings))], tokens_per_batch=30)
    assert result.error is None, result.error
    return {name: pl.from_arrow(table) for name, table in result.tables.items()}


def states(side: Subject, sequence: ProbeSequence, layer: int) -> np.ndarray:
    """Output of a block for one sequence alone, [T, D]."""
    hidden = side.module(torch.from_numpy(sequence.token_T)[None].long(), output_hidden_states=True).hidden_states
    return hidden[layer + 1][0].double().numpy()


def stacked(pair: ModelPair, places: list[tuple[ProbeSequence, int]], layer: int) -> tuple[np.ndarray, np.ndarray]:
    """δ and h_base at these (sequence, position), [N, D] each."""
    distinct = {id(sequence): sequence for sequence, _ in places}
    sides = []
    for side in (pair.base, pair.tuned):
        states_TD = {key: states(side, sequence, layer) for key, sequence in distinct.items()}
        sides.append(np.stack([states_TD[id(sequence)][at] for sequence, at in places]))
    return sides[1] - sides[0], sides[0]


def assert_vector(row: dict[str, Any], delta_ND: np.ndarray, base_ND: np.ndarray) -> None:
    mean_D = delta_ND.mean(0)
    np.testing.assert_allclose(row["vector"], mean_D, atol=1e-5)
    assert row["n_tokens"] == len(delta_ND)
    assert row["norm"] == pytest.approx(np.linalg.norm(mean_D), rel=1e-4)
    assert row["relative_norm"] == pytest.approx(np.linalg.norm(mean_D) / np.linalg.norm(base_ND.mean(0)), rel=1e-4)


def labelled(vectors: pl.DataFrame, layer: int) -> dict[int | None, dict[str, Any]]:
    return {row["position"]: row for row in vectors.filter(pl.col("layer") == layer).to_dicts()}


def folded(pair: ModelPair, base_ND: torch.Tensor, tuned_ND: torch.Tensor) -> dict[str, pl.DataFrame]:
    """The tables of made-up residuals: N texts of one token, a block each."""
    probe = corpus(*[text(1, np.random.default_rng(0))] * len(base_ND))
    context = StreamContext(pair.base, pair.tuned, pair.tokenizer, probe, n_layers=1, d_model=WIDTH, vocab_size=VOCAB)
    fold = AdlFold(context, AdlSettings())
    one_N, place_N, role_N, flag_N = torch.ones(1), np.zeros(1, np.int64), np.zeros(1, np.int8), np.zeros(1, bool)
    for row, both in enumerate(zip(base_ND.split(1), tuned_ND.split(1), strict=True)):
        sides = [Side({0: states_ND}, 0, lambda given: given, VOCAB) for states_ND in both]
        fold.update(TokenBlock(one_N, one_N, place_N + row, place_N, role_N, flag_N, *sides))
    return {name: pl.from_arrow(table) for name, table in fold.finish().items()}


# ---- means --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [0, 2])
def test_vectors_are_means_over_texts_per_position_and_over_all_tokens(pair: ModelPair, skip: int) -> None:
    probe = corpus(skip=skip)
    vectors = run(pair, probe, positions=5)["adl_vectors"]
    for layer in range(LAYERS - 1):
        rows = labelled(vectors, layer)
        assert set(rows) == {None, *range(skip, 5)}
        for position in range(skip, 5):
            places = [(sequence, position) for sequence in probe.sequences if len(sequence) > position]
            assert_vector(rows[position], *stacked(pair, places, layer))
        everywhere = [(sequence, position) for sequence in probe.sequences for position in range(skip, len(sequence))]
        assert_vector(rows[None], *stacked(pair, everywhere, layer))


def test_labels_of_a_chat_count_from_the_answer_and_are_negative_in_the_template_before_it(pair: ModelPair) -> None:
    """The toolkit tested for positions from 0 on, so its chat layers were never complete."""
    draw = np.random.default_rng(1)
    chats = [chat(draw, (4, 3), (2, 6)), chat(draw, (4, 5), (2, 4), (4, 2), (2, 9)), chat(draw, (1, 1), (0, 2))]
    starts = [9, 11, 2]
    rows = labelled(run(pair, corpus(*chats), positions=5, before_answer=3)["adl_vectors"], 1)
    assert set(rows) == {None, *range(-3, 5)}
    for label in range(-3, 5):
        places = [
            (each, start + label) for each, start in zip(chats, starts, strict=True) if 0 <= start + label < len(each)
        ]
        assert_vector(rows[label], *stacked(pair, places, 1))
    assert [rows[label]["n_tokens"] for label in (-3, -1, 0, 1, 2)] == [2, 3, 3, 3, 2]


def test_a_chat_cut_before_its_answer_has_no_label_but_counts_in_the_mean_over_all_tokens(pair: ModelPair) -> None:
    draw = np.random.default_rng(2)
    whole, cut = chat(draw, (4, 3), (2, 6)), chat(draw, (4, 8), (2, 0))
    rows = labelled(run(pair, corpus(whole, cut), positions=5, before_answer=3)["adl_vectors"], 0)
    assert {label: row["n_tokens"] for label, row in rows.items()} == {None: len(whole) + len(cut)} | dict.fromkeys(
        range(-3, 5), 1
    )
    assert_vector(rows[0], *stacked(pair, [(whole, 9)], 0))
    assert set(labelled(run(pair, corpus(cut))["adl_vectors"], 0)) == {None}


def test_texts_and_chats_of_one_corpus_have_positions_of_their_own(pair: ModelPair) -> None:
    draw = np.random.default_rng(3)
    plain, talk = text(6, draw), chat(draw, (2, 2), (1, 4))
    vectors = run(pair, corpus(plain, talk), positions=2, before_answer=1, layers=(0,))["adl_vectors"]
    rows = {(row["counted_from"], row["position"]): row for row in vectors.to_dicts()}
    assert set(rows) == {("all", None), ("start", 0), ("start", 1), ("answer", -1), ("answer", 0), ("answer", 1)}
    assert_vector(rows["start", 1], *stacked(pair, [(plain, 1)], 0))
    assert_vector(rows["answer", 1], *stacked(pair, [(talk, 6)], 0))


def test_every_layer_is_read_in_the_same_pass_and_one_layer_alone_gives_the_same(pair: ModelPair) -> None:
    every, one = run(pair), run(pair, layers=(0,))
    for name in ("adl_vectors", "adl_tokens", "adl_states"):
        assert set(every[name]["layer"]) == set(range(LAYERS))
        assert_frame_equal(every[name].filter(pl.col("layer") == 0), one[name])


def test_mean_activations_are_read_through_their_own_models(pair: ModelPair) -> None:
    """Else a reader cannot tell what the difference says from what the text says anyhow."""
    tables = run(pair, top_tokens=5)
    probe = corpus()
    places = [(sequence, 0) for sequence in probe.sequences]
    delta_ND, base_ND = stacked(pair, places, 0)
    for side, mean_D in (("base", base_ND.mean(0)), ("tuned", (base_ND + delta_ND).mean(0))):
        logits_V = getattr(pair, side).readout(torch.from_numpy(mean_D).float()[None])[0]
        listed = tables["adl_states"].filter(
            (pl.col("layer") == 0) & (pl.col("position") == 0) & (pl.col("side") == side)
        )
        assert listed["rank"].to_list() == [1, 2, 3, 4, 5]
        expected = logits_V.softmax(-1)[listed["token_id"].to_numpy()]
        np.testing.assert_allclose(listed["probability"], expected, rtol=1e-4)
        assert (np.diff(expected.numpy()) <= 0).all()


def test_memory_does_not_grow_with_the_corpus(pair: ModelPair) -> None:
    """The toolkit kept every sample: 31 GB per layer where running sums need 2 MB."""

    def held(n_texts: int) -> int:
        probe = corpus(*[text(4, np.random.default_rng(0))] * n_texts)
        context = StreamContext(pair.base, pair.tuned, pair.tokenizer, probe, n_layers=1, d_model=WIDTH, vocab_size=VOCAB)
        return AdlFold(context, AdlSettings())._delta.numpy().nbytes

    assert held(1) == held(1000) == 6 * WIDTH * 8


def test_a_stored_vector_takes_the_room_of_one_vector(pair: ModelPair, tmp_path: Path) -> None:
    """The toolkit saved views, each with the whole storage behind it: 1 MB a vector where 9.5 kB would do."""
    delta_ND = torch.randn(200, WIDTH, generator=torch.Generator().manual_seed(0))
    vectors = folded(pair, 0 * delta_ND, delta_ND)["adl_vectors"]
    vectors.write_parquet(tmp_path / "vectors.parquet", compression="uncompressed")
    assert (tmp_path / "vectors.parquet").stat().st_size < len(vectors) * WIDTH * 4 + 5000


def test_means_do_not_drift_in_storage_dtype_over_thousands_of_batches(pair: ModelPair) -> None:
    """The toolkit's bf16 running means: after 50,000 updates with a signal of 0.1 σ, an error of 12.7 %."""
    draw = torch.Generator().manual_seed(0)
    base_ND = torch.randn(2000, WIDTH, generator=draw).bfloat16()
    tuned_ND = (base_ND.float() + 0.1 + torch.randn(2000, WIDTH, generator=draw)).bfloat16()
    rows = labelled(folded(pair, base_ND, tuned_ND)["adl_vectors"], 0)
    exact_D = (tuned_ND.double() - base_ND.double()).mean(0)
    for label in (None, 0):
        np.testing.assert_allclose(rows[label]["vector"], exact_D, rtol=1e-6)
        assert rows[label]["n_tokens"] == 2000


# ---- lens ---------------------------------------------------------------------------------------------------------


def test_lens_is_the_head_of_gain_times_difference_in_both_directions(pair: ModelPair) -> None:
    tables = run(pair, top_tokens=VOCAB, layers=(1,))
    readable = np.setdiff1d(np.arange(VOCAB), [model_files.tokenizer().eos_token_id])
    for position, row in labelled(tables["adl_vectors"], 1).items():
        delta_D = torch.tensor(row["vector"]).double()
        for head, side in (("base", pair.base), ("tuned", pair.tuned)):
            model = side.module
            read_V = model.lm_head.weight.double() @ (
                model.model.norm.weight.double() * delta_D / delta_D.square().mean().sqrt()
            )
            for direction, sign in (("promoted", 1), ("suppressed", -1)):
                probability_V = (sign * read_V).softmax(-1).numpy()
                rows = tables["adl_tokens"].filter(
                    pl.col("position").eq_missing(position)
                    & (pl.col("head") == head)
                    & (pl.col("direction") == direction)
                )
                order = readable[np.argsort(-probability_V[readable])]
                assert rows["token_id"].to_list() == order.tolist()
                assert rows["token"].to_list() == [f"w{token}" for token in order]
                assert rows["rank"].to_list() == list(range(1, len(order) + 1))
                np.testing.assert_allclose(rows["probability"], probability_V[order], rtol=1e-3)


@pytest.mark.parametrize("kind", ["phi", "gpt_neox", "gpt2"])
def test_lens_of_a_difference_drops_biases(kind: str) -> None:
    """A norm's or head's bias says nothing of a direction; the toolkit decoded differences as if they were states."""
    subject = Subject.of(model_files.build(kind))
    delta_ND = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
    norm, head = subject.layout.norm, subject.layout.head
    before = subject.lens_of_difference(delta_ND)
    assert kind != "phi" or head.bias is not None
    with torch.no_grad():
        for bias in (norm.bias, head.bias):
            if bias is not None:
                bias.add_(10 * torch.randn_like(bias))
    torch.testing.assert_close(subject.lens_of_difference(delta_ND), before, atol=2e-3, rtol=1e-3)
    centred_ND = delta_ND - delta_ND.mean(-1, keepdim=True)
    torch.testing.assert_close(before, centred_ND * norm.weight @ head.weight.T, atol=2e-3, rtol=1e-3)
    assert torch.equal(
        subject.lens_of_difference(-delta_ND).argsort(), (-subject.lens_of_difference(delta_ND)).argsort()
    )


def test_tokens_are_listed_as_text_and_not_as_pieces_of_the_tokenizer(pair: ModelPair) -> None:
    """The toolkit compared decoded ' court' with the raw piece 'Ġcourt', so frequent tokens were undercounted."""
    pieces = ["Ġcourt", "<eos>", *(f"Ġw{number}" for number in range(VOCAB - 2))]
    tokenizer = model_files.tokenizer(pieces)
    tokenizer.backend_tokenizer.decoder = ByteLevel()
    [result] = paired_pass([replace(pair, tokenizer=tokenizer)], corpus(), [(ADL, AdlSettings(top_tokens=VOCAB))])
    assert set(result.tables["adl_tokens"]["token"].to_pylist()) == {" court", *(f" w{number}" for number in range(VOCAB - 2))}


def test_size_of_the_difference_changes_neither_order_nor_probability(pair: ModelPair) -> None:
    vector_ND = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(0))
    small, large = (folded(pair, 0 * vector_ND, scale * vector_ND)["adl_tokens"] for scale in (1e-3, 1e3))
    assert small["token_id"].equals(large["token_id"])
    np.testing.assert_allclose(small["probability"], large["probability"], rtol=1e-4)


def test_identical_models_have_zero_vectors_and_no_tokens(pair: ModelPair) -> None:
    same = ModelPair(pair.base, pair.base, pair.tokenizer, pair.pair, VOCAB)
    tables = run(same)
    assert tables["adl_vectors"]["norm"].to_list() == [0.0] * len(tables["adl_vectors"])
    assert len(tables["adl_tokens"]) == 0


def test_findings_are_the_tuned_heads_promoted_tokens_at_the_shown_depths(pair: ModelPair) -> None:
    settings = AdlSettings(shown=9, shown_layers=(0.5, 1.0), positions=2)
    [result] = paired_pass([pair], corpus(), [(ADL, settings)])
    shown = ADL.findings(result.tables, settings)
    assert [(finding.source_key["rank"], finding.layer, finding.position) for finding in shown[:7]] == [
        (1, 2, None), (1, 2, 0), (1, 2, 1), (1, 1, None), (1, 1, 0), (1, 1, 1), (2, 2, None),
    ]  # fmt: skip
    assert {(finding.source_key["head"], finding.source_key["direction"]) for finding in shown} == {
        ("tuned", "promoted")
    }
    top = max(pl.from_arrow(result.tables["adl_vectors"]).to_dicts(), key=lambda row: row["relative_norm"])
    where = "all tokens" if top["position"] is None else f"position {top['position']}"
    assert ADL.headline(result.tables) == {
        "max_relative_norm": top["relative_norm"],
        "at": f"layer {top['layer']}, {where}",
    }


def test_findings_come_from_the_layers_that_were_read_wherever_they_lie(pair: ModelPair) -> None:
    settings = AdlSettings(layers=(0,), positions=2)
    [result] = paired_pass([pair], corpus(), [(ADL, settings)])
    shown = ADL.findings(result.tables, settings)
    assert len(shown) == settings.shown
    assert {finding.layer for finding in shown} == {0}
