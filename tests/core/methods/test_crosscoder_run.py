"""Crosscoder on stored activations of small models: fit, counts, causal test, folders, stopping and going on."""

import contextlib
import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from diffing_core.activation_pairs import PairedActivations, Selection, StoredPair, joined
from diffing_core.activations import ActivationStore
from diffing_core.capture import capture_residuals
from diffing_core.comparison import run_key
from diffing_core.corpus import ROLES, ProbeCorpus, ProbeSequence
from diffing_core.document_blocks import block_of, by_block
from diffing_core.errors import NotComputableError
from diffing_core.fit_reading import FitReading
from diffing_core.lake import Lake
from diffing_core.methods import get_method
from diffing_core.methods.base import Inputs, Need
from diffing_core.methods.crosscoder import METHOD, checkpoint, fitting
from diffing_core.methods.crosscoder.causal import Condition, Read, causal_effects, conditions
from diffing_core.methods.crosscoder.data import Batches, Sample
from diffing_core.methods.crosscoder.model import Crosscoder
from diffing_core.methods.crosscoder.partition import Partition
from diffing_core.methods.crosscoder.reading import PARTS, Explained, Reading, whole_sequences
from diffing_core.methods.crosscoder.settings import CrosscoderSettings
from diffing_core.models import ModelPair, Subject
from diffing_core.paired_pass import paired_pass
from diffing_core.pairs import Pair
from tests import model_files
from tests.model_files import VOCAB, WIDTH

ACTIVATIONS = get_method("activations")
QUICK = {"min_steps": 30, "steered": 0, "causal_tokens": 60, "least_active": 3, "listed": 5}


def corpus(name: str, n_sequences: int, seed: int) -> ProbeCorpus:
    draw = np.random.default_rng(seed)
    sequences = tuple(
        ProbeSequence(draw.integers(2, VOCAB, n).astype(np.int32), np.zeros(n, np.int8), np.zeros(n, bool))
        for n in draw.integers(4, 14, n_sequences)
    )
    return ProbeCorpus(name, sequences, n_sequences)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelPair, StoredPair]:
    """A base, a finetune that moves one write matrix, and their activations on two corpora."""
    base, tuned = (model_files.build(tie_word_embeddings=False) for _ in range(2))
    with torch.no_grad():
        tuned.model.layers[1].mlp.down_proj.weight += 0.3 * torch.randn(WIDTH, 48, generator=torch.Generator().manual_seed(3))
    sides = [Subject.of(module, revision=name) for name, module in (("base", base), ("tuned", tuned))]
    pair = ModelPair(*sides, model_files.tokenizer(), Pair("m", "o"), VOCAB, "tuned")
    store = tmp_path_factory.mktemp("store")
    corpora = corpus("one", 30, 0), corpus("two", 10, 1)
    for each in corpora:
        [result] = paired_pass([pair], each, [(ACTIVATIONS, ACTIVATIONS.settings(layers=None))], store=store)
        assert result.error is None, result.error
    return pair, StoredPair(ActivationStore(store), *((side.revision, side.dtype) for side in sides), corpora)


def run(made: tuple[ModelPair, StoredPair], folder: Path, **settings: object) -> dict[str, pl.DataFrame]:
    pair, stored = made
    inputs = Inputs(METHOD, {Need.MODELS: lambda: pair, Need.ACTIVATIONS: lambda: stored, Need.FOLDER: lambda: folder})
    tables = METHOD.run(inputs, CrosscoderSettings(**QUICK | settings))
    return {name: pl.from_arrow(table) for name, table in tables.items()}


def some_crosscoder(seed: int = 0, n_latents: int = 16) -> Crosscoder:
    """Random weights, every latent active now and then, decoders of the two models unlike."""
    draw = torch.Generator().manual_seed(seed)
    mean_MD = [torch.zeros(WIDTH)] * 2
    made = Crosscoder.initial(Partition.of("plain", n_latents, 0.0, 1.0), mean_MD, (1.0, 1.0), seed)
    made.decoder_MFD[1] = made.decoder_MFD[1] + 0.5 * torch.randn(n_latents, WIDTH, generator=draw)
    return made


def test_every_layer_that_is_wanted_has_its_rows_and_its_file(made: tuple[ModelPair, StoredPair], tmp_path: Path) -> None:
    tables = run(made, tmp_path, layers=None)
    for name in ("crosscoder_fits", "crosscoder_latents", "crosscoder_training", "crosscoder_causal", "crosscoder_tokens"):
        assert sorted(tables[name]["layer"].unique()) == ([0, 1, 2] if name != "crosscoder_tokens" else [1, 2]), name
    for row in tables["crosscoder_fits"].to_dicts():
        crosscoder, config = checkpoint.load((tmp_path / row["file"]).parent)
        assert crosscoder.n_latents == row["n_latents"] and config["threshold"] == row["threshold"]
    with pytest.raises(NotComputableError, match="no layer is stored"):
        run((made[0], StoredPair(made[1].store, *((f"{side}x", torch.float32) for side in "ab"), made[1].corpora)), tmp_path)


def test_latents_are_counted_as_a_plain_loop_counts_them(made: tuple[ModelPair, StoredPair], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffing_core.document_blocks.MOST_TOGETHER", 20)
    pair, stored = made
    crosscoder, place, activations = some_crosscoder(), FitReading(pair, stored), stored.at(1)
    held_out = Selection(part="held_out")
    shift_MD = (torch.zeros(WIDTH), torch.zeros(WIDTH))
    found = Reading.of(crosscoder, activations, held_out, place, shift_MD)
    rows = joined(list(activations.blocks()))
    code_NF = crosscoder.encode((rows.base_ND, rows.tuned_ND)).numpy()
    sequence_N, held_out_N = place.sequence_N(rows), held_out.keeps(rows)
    assert found.n_tokens == len(rows) == place.context.corpus.n_tokens and found.n_sequences == 40
    assert found.n_active_F.tolist() == (code_NF > 0).sum(0).tolist()
    assert found.held_out_active_F.tolist() == (code_NF[held_out_N] > 0).sum(0).tolist()
    assert found.explained.n_tokens_P[PARTS.index("held_out")] == held_out_N.sum() > 0
    for part_N, part in ((~held_out_N, "fit"), (held_out_N, "held_out")):
        activation_ND, rebuilt_ND = rows.tuned_ND[part_N], crosscoder.reconstruct(torch.from_numpy(code_NF[part_N]))[1]
        expected = (activation_ND - rebuilt_ND).square().sum() / (activation_ND - activation_ND.mean(0)).square().sum()
        assert found.explained.fvu("tuned", PARTS.index(part)) == pytest.approx(float(expected), rel=1e-4)
    assert found.maximum_F.tolist() == pytest.approx(code_NF.max(0).tolist(), rel=1e-5)
    active = [len(np.unique(sequence_N[code_N > 0])) for code_N in code_NF.T]
    assert found.sequences_F.tolist() == active


def test_fit_of_the_mean_is_one_and_of_the_truth_is_zero() -> None:
    draw = torch.Generator().manual_seed(0)
    pair = tuple(5 + torch.randn(100, 4, generator=draw) for _ in range(2))
    shift = (torch.full((4,), 3.0), torch.full((4,), 2.0))
    for errors, expected in ((pair, 1.0), (tuple(torch.zeros(100, 4) for _ in range(2)), 0.0)):
        fit = Explained(shift, 2)
        for rows in (slice(0, 30), slice(30, 100)):
            n_active_N = np.ones(rows.stop - rows.start, np.int64)
            fit.add(tuple(each[rows] for each in pair), tuple(
                (each[rows] - whole.mean(0)) if expected else each[rows] for each, whole in zip(errors, pair, strict=True)
            ), n_active_N, n_active_N)  # fmt: skip
        assert [fit.fvu(stream, 1) for stream in ("base", "tuned", "difference")] == pytest.approx([expected] * 3, abs=1e-6)
        assert fit.fvu("base", 0) is None, "no token was of this part"
    same = Explained(shift, 1)
    same.add((pair[0], pair[0]), (pair[0], pair[0]), np.zeros(100), np.zeros(100, np.int64))
    assert same.fvu("difference", 0) is None, "nothing to explain where the models agree"


def test_sequences_stay_whole_and_in_their_block(made: tuple[ModelPair, StoredPair], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffing_core.activation_pairs.ROWS_PER_GROUP", 16)
    monkeypatch.setattr("diffing_core.document_blocks.MOST_TOGETHER", 30)
    pair, stored = made
    place = FitReading(pair, stored)
    seen: dict[int, int] = {}
    for number, (block, rows) in enumerate(by_block(whole_sequences(stored.at(0).blocks()))):
        sequence_N = place.sequence_N(rows)
        assert (block_of(rows.document_N) == block).all()
        for sequence in np.unique(sequence_N).tolist():
            assert seen.setdefault(sequence, number) == number, "cut in two"
    assert sorted(seen) == list(range(40))


def test_outliers_are_left_out_everywhere(made: tuple[ModelPair, StoredPair]) -> None:
    activations = made[1].at(2)
    rows = joined(list(activations.blocks()))
    norms_MN = torch.stack([rows.base_ND.float().norm(dim=1), rows.tuned_ND.float().norm(dim=1)])
    ratio = 1.2
    activations = activations.without(activations.outliers(ratio))
    sample = Sample.of(activations, seed=0)
    fits_N = (norms_MN.numpy() <= ratio * np.median(norms_MN.numpy(), axis=1, keepdims=True)).all(0)
    assert len(sample.rows) == int(fits_N.sum()) < len(rows)
    trained_on = sum(len(base_ND) for base_ND, _ in Batches(activations, 8, 0)(0))
    assert len(sample.rows) - 8 < trained_on <= len(sample.rows)


def test_common_scale_brings_the_mean_length_to_root_d(made: tuple[ModelPair, StoredPair]) -> None:
    sample = Sample.of(made[1].at(2), seed=0)
    lengths = [each.double().norm(dim=1).mean() for each in (sample.rows.base_ND, sample.rows.tuned_ND)]
    common, again = sample.scale_M(common=True)
    assert common == again
    assert float(common * (lengths[0] + lengths[1]) / 2) == pytest.approx(WIDTH**0.5)
    own = sample.scale_M(common=False)
    assert [float(scale * length) for scale, length in zip(own, lengths, strict=True)] == pytest.approx([WIDTH**0.5] * 2)


def test_an_epoch_is_the_same_again_and_another_one_another(made: tuple[ModelPair, StoredPair]) -> None:
    batches = Batches(made[1].at(0), 16, seed=0)
    first, again, second = ([base_ND.clone() for base_ND, _ in batches(epoch)] for epoch in (0, 0, 1))
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], second[0])
    assert {len(each) for each in first[:-1]} == {16}


@pytest.mark.parametrize("layer", [1, 2])
def test_causal_effects_equal_those_of_a_forward_from_the_patched_stream(made: tuple[ModelPair, StoredPair], layer: int) -> None:
    """At the last layer without the blocks: the same numbers as through a hook that sets the stream."""
    pair, stored = made
    reading, crosscoder = FitReading(pair, stored), some_crosscoder()
    some = np.asarray([3, 7])
    tried = [Condition("none", "add", some[:0]), Condition("s", "add", some), Condition("s", "remove", some)]
    tokens = Read(10**6, 0, None, 0)
    (found, n_tokens, n_sequences), answers = causal_effects(crosscoder, reading, layer, tried, tokens)
    assert answers == ([], 0, 0), "no token is of an answer"
    assert (n_tokens, n_sequences) == (reading.context.corpus.n_tokens, 40)
    base_FD, tuned_FD = crosscoder.directions()
    totals = np.zeros(3)
    for sequence in reading.context.corpus.sequences:
        [batch] = ProbeCorpus("one", (sequence,), 1).batches(100)
        base_ND, tuned_ND = (capture_residuals(side, batch, (layer,))[layer] for side in (pair.base, pair.tuned))
        moved_ND = crosscoder.encode((base_ND, tuned_ND))[:, some] @ (tuned_FD - base_FD)[some]
        own_NV = logprobs_from(pair.tuned, layer, batch.token_BT, tuned_ND)
        for place, state_ND in enumerate((base_ND, base_ND + moved_ND, tuned_ND - moved_ND)):
            other_NV = logprobs_from(pair.tuned, layer, batch.token_BT, state_ND)
            totals[place] += float((own_NV.exp() * (own_NV - other_NV)).sum())
    np.testing.assert_allclose([effect.kl_nats for effect in found], totals / n_tokens, rtol=1e-3, atol=1e-6)
    shares = [effect.share for effect in found]
    assert shares == pytest.approx([0, 1 - totals[1] / totals[0], totals[2] / totals[0]], abs=1e-3)
    for effect in found:
        assert effect.kl_interval.low <= effect.kl_nats <= effect.kl_interval.high


def logprobs_from(subject: Subject, layer: int, token_BT: np.ndarray, state_ND: torch.Tensor) -> torch.Tensor:
    """The Hugging Face model with one block's output replaced."""
    with subject.active() as model:
        handle = subject.blocks[layer].register_forward_hook(lambda *_: state_ND[None])
        logits_BTV = model(input_ids=torch.from_numpy(token_BT)).logits
        handle.remove()
    return logits_BTV[0].log_softmax(-1)


def test_a_reconstruction_without_error_takes_all_the_divergence_away(made: tuple[ModelPair, StoredPair]) -> None:
    """A crosscoder of the identity: a latent for every dimension and sign of each model."""
    pair, stored = made
    one_DD, none_DD = torch.eye(WIDTH), torch.zeros(WIDTH, WIDTH)
    signed_FD = torch.cat([one_DD, -one_DD])
    empty_FD = torch.cat([none_DD, none_DD])
    decoders = [torch.cat([signed_FD, empty_FD]), torch.cat([empty_FD, signed_FD])]
    identity = Crosscoder(
        Partition.of("plain", 4 * WIDTH, 0.0, 1.0), (1.0, 1.0), [each.T.contiguous() for each in decoders], decoders,
        [torch.zeros(WIDTH)] * 2, torch.zeros(4 * WIDTH),
    )  # fmt: skip
    everything = np.arange(4 * WIDTH)
    tried = conditions({}, everything, everything, 0)
    found, _ = causal_effects(identity, FitReading(pair, stored), 1, tried, Read(60, 0, None, 0))
    by_name = {(condition.name, condition.action): effect for condition, effect in zip(tried, found.effects, strict=True)}
    assert by_name["none", "add"].kl_nats > 0.001
    for key in (("all", "add"), ("all and biases", "add"), ("reconstruction", "replace")):
        assert by_name[key].kl_nats < 1e-5 and by_name[key].share > 0.99, key
    assert by_name["all", "remove"].share == pytest.approx(1.0, rel=1e-3)
    assert by_name["error only", "add"].share == pytest.approx(0.0, abs=1e-3), "nothing is left unexplained"


def test_without_latents_the_error_is_the_whole_difference(made: tuple[ModelPair, StoredPair]) -> None:
    pair, stored = made
    silent = some_crosscoder()
    silent.threshold = float("inf")
    silent.decoder_bias_MD = [torch.zeros(WIDTH), torch.zeros(WIDTH)]
    nothing = np.arange(0)
    tried = conditions({}, nothing, nothing, 0)
    found, _ = causal_effects(silent, FitReading(pair, stored), 1, tried, Read(60, 0, None, 0))
    by_name = {condition.name: effect for condition, effect in zip(tried, found.effects, strict=True)}
    assert by_name["none"].kl_nats > 0.001
    assert by_name["error only"].kl_nats < 1e-6 and by_name["error only"].share > 0.999
    assert by_name["all and biases"].share == pytest.approx(0.0, abs=1e-6)


def test_answers_are_averaged_by_themselves(made: tuple[ModelPair, StoredPair]) -> None:
    """All tokens of one text are of an answer, none of the others': its mean is that text's."""
    pair, stored = made
    reading, crosscoder = FitReading(pair, stored), some_crosscoder()
    plain = reading.context.corpus
    answering = replace(plain.sequences[3], role_T=np.full(len(plain.sequences[3]), ROLES.index("assistant"), np.int8))
    object.__setattr__(reading.context, "corpus", replace(plain, sequences=(*plain.sequences[:3], answering, *plain.sequences[4:])))
    tried = conditions({}, np.arange(0), np.arange(0), 0)
    tokens = Read(10**6, 0, None, 0)
    whole, answers = causal_effects(crosscoder, reading, 1, tried, tokens)
    assert (answers.n_tokens, answers.n_sequences) == (len(answering), 1) and whole.n_sequences == 40
    alone_S = np.arange(40) == 3
    alone, _ = causal_effects(crosscoder, reading, 1, tried, tokens._replace(held_out_S=alone_S))
    assert alone.n_sequences == 1
    for in_answers, by_itself in zip(answers.effects, alone.effects, strict=True):
        assert in_answers.kl_nats == pytest.approx(by_itself.kl_nats, rel=1e-4, abs=1e-7)


def test_the_causal_test_reads_what_was_not_trained_on(made: tuple[ModelPair, StoredPair]) -> None:
    pair, stored = made
    reading = FitReading(pair, stored)
    held_out_S = reading.held_out_S(0.3)
    rows = joined(list(stored.at(1).of(Selection(part="held_out", held_out_share=0.3)).blocks()))
    assert np.unique(reading.sequence_N(rows)).tolist() == np.flatnonzero(held_out_S).tolist()
    tokens = Read(10**6, 0, None, 0, held_out_S=held_out_S)
    read = [len(batch.sequences) for batch, *_ in tokens.batches(reading.context.corpus)]
    assert 0 < sum(read) == held_out_S.sum() < 40


@pytest.mark.parametrize("most", [1, 30, 100])
def test_the_causal_test_reads_no_more_tokens_than_asked_for_or_one_text(made: tuple[ModelPair, StoredPair], most: int) -> None:
    corpus = FitReading(*made).context.corpus
    batches = [batch for batch, *_ in Read(most, 0, None, 0).batches(corpus)]
    n_texts, n_tokens = sum(len(batch.sequences) for batch in batches), sum(int(batch.mask_BT.sum()) for batch in batches)
    assert n_tokens <= most or n_texts == 1
    assert n_tokens > most - 14 or n_texts == 1, "a text has 13 tokens at most"


@pytest.mark.parametrize("skipped", ["by the model", "by the corpus"])
def test_the_causal_test_neither_encodes_nor_counts_tokens_that_no_method_sees(
    made: tuple[ModelPair, StoredPair], skipped: str
) -> None:
    """Tokens before `skip_first_tokens` of the model, or before where a corpus's sequences start, are context alone."""
    reading = FitReading(*made)
    plain = reading.context.corpus
    late = replace(plain, sequences=tuple(replace(sequence, start=3) for sequence in plain.sequences))
    shown = plain.skipping(3) if skipped == "by the model" else late
    object.__setattr__(reading.context, "corpus", shown)
    tokens = Read(10**6, 0, None, 0)
    whole, _ = causal_effects(some_crosscoder(), reading, 1, conditions({}, np.arange(0), np.arange(0), 0), tokens)
    assert whole.n_tokens == shown.n_tokens == plain.n_tokens - 3 * 40
    assert sum(read_N.sum() for _, read_N, *_ in tokens.batches(shown)) == shown.n_tokens


def test_controls_are_as_large_as_their_set_and_share_nothing_with_it() -> None:
    chosen, everything = np.asarray([1, 4, 6]), np.arange(10)
    tried = {(each.name, each.action): each.latents for each in conditions({"found": chosen}, everything, everything, 0)}
    control = tried["random as found", "add"]
    assert len(control) == 3 and not set(control) & set(chosen)
    assert np.array_equal(control, tried["random as found", "remove"])


def test_a_finished_crosscoder_is_not_trained_again(
    made: tuple[ModelPair, StoredPair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(made, tmp_path)
    monkeypatch.setattr(fitting, "train", lambda *_: pytest.fail("trained again"))
    second = run(made, tmp_path)
    assert all(first[name].equals(second[name]) for name in first)


def interrupting(at: int) -> Callable:
    """A progress that is stopped by the user after so many steps."""
    @contextlib.contextmanager
    def track(total: int, unit: str, what: str, done: int = 0):

        def advance(amount: int, **measures: float) -> None:
            nonlocal done
            done += amount
            if done >= at:
                raise KeyboardInterrupt

        yield advance

    return track


def test_an_interrupted_run_goes_on_and_ends_with_the_same_tables(
    made: tuple[ModelPair, StoredPair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = run(made, tmp_path / "unbroken")
    with monkeypatch.context() as patched:
        patched.setattr(fitting, "track", interrupting(11))
        with pytest.raises(KeyboardInterrupt):
            run(made, tmp_path / "broken")
    left = [path.name for path in (tmp_path / "broken").rglob("*") if path.is_file()]
    assert left == [checkpoint.CHECKPOINT]
    taken_up = run(made, tmp_path / "broken")
    assert all(unbroken[name].equals(taken_up[name]) for name in unbroken)


def test_a_step_that_was_cut_short_is_not_kept(made: tuple[ModelPair, StoredPair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights moved, counters not yet: going on from there would be another run."""
    taken = []

    def step(self: torch.optim.Adam, *_: object) -> None:
        taken.append(1)
        if len(taken) == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.Adam, "step", step)
        with pytest.raises(KeyboardInterrupt):
            run(made, tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_an_interrupt_within_a_step_waits_for_its_end_and_its_log_row(
    made: tuple[ModelPair, StoredPair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken, step, taken = run(made, tmp_path / "unbroken"), torch.optim.Adam.step, []

    def interrupted(self: torch.optim.Adam, *_: object) -> None:
        taken.append(1)
        if len(taken) == 7:
            os.kill(os.getpid(), signal.SIGINT)
        step(self)

    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.Adam, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(made, tmp_path / "broken")
    [left] = [path for path in (tmp_path / "broken").rglob("*") if path.is_file()]
    place = json.loads(checkpoint._load(left)[1]["place"])
    assert place["done"] == 7 and [row["step"] for row in place["log"]] == list(range(1, 8))
    taken_up = run(made, tmp_path / "broken")
    assert all(unbroken[name].equals(taken_up[name]) for name in unbroken)


def test_an_interrupt_of_the_last_step_finds_the_crosscoder_finished(
    made: tuple[ModelPair, StoredPair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: torch.optim.Adam, *_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(torch.optim.Adam, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(made, tmp_path, min_steps=1, epochs=0.01)
    monkeypatch.setattr(fitting, "train", lambda *_: pytest.fail("trained again"))
    assert run(made, tmp_path, min_steps=1, epochs=0.01)["crosscoder_training"]["step"].to_list() == [1]


@pytest.mark.parametrize("at", [11, None], ids=["checkpoint", "finished"])
def test_what_was_fitted_on_other_bytes_is_trained_anew_and_said(
    made: tuple[ModelPair, StoredPair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    at: int | None,
) -> None:  # fmt: skip
    settings, steps = CrosscoderSettings(**QUICK), []
    with monkeypatch.context() as patched:
        if at is not None:
            patched.setattr(fitting, "track", interrupting(at))
        with contextlib.suppress(KeyboardInterrupt):
            fitting.fit(made[1].at(2), settings, tmp_path, "cpu")
    fingerprint = PairedActivations.fingerprint.fget
    monkeypatch.setattr(PairedActivations, "fingerprint", property(lambda self: "anew " + fingerprint(self)))
    monkeypatch.setattr(fitting, "track", counting(steps))
    with caplog.at_level("INFO", "diffing_core.methods.crosscoder.checkpoint"):
        fitted = fitting.fit(made[1].at(2), settings, tmp_path, "cpu")
    [said] = [each for each in caplog.messages if "training anew" in each]
    assert "which are now anew" in said and sum(steps) == 30
    assert all(tensor.grad is None for tensor in fitted.crosscoder.parameters().values())
    steps.clear()
    fitting.fit(made[1].at(2), settings, tmp_path, "cpu")
    assert steps == [], "the new one stands in its place"


def counting(steps: list[int]) -> Callable:
    """A progress that notes its amounts."""

    @contextlib.contextmanager
    def track(*_: object):
        yield lambda amount, **measures: steps.append(amount)

    return track


def test_roles_and_template_choose_what_is_read_and_encoded(made: tuple[ModelPair, StoredPair]) -> None:
    settings = CrosscoderSettings(roles=("user",), template=False)
    assert settings.selection("fit") == Selection(1, ("user",), False, "fit", 0.1)
    user = ROLES.index("user")
    role_T, template_T = np.asarray([0, user, user, user, 0], np.int8), np.asarray([0, 0, 0, 1, 1], bool)
    text = ProbeCorpus("chat", (ProbeSequence(np.arange(5, dtype=np.int32), role_T, template_T),), 1)
    [(_, read_N, _, answer_N)] = Read(5, 2, None, 0, settings.roles, settings.template).batches(text)
    [(_, default_N, *_)] = Read(5, 2, None, 0).batches(text)
    assert read_N.tolist() == [False, False, True, False, False] and not answer_N.any()
    assert default_N.tolist() == [False, False, True, True, True]


def test_cosines_are_of_what_each_model_gives_and_of_what_is_read_in_it(made: tuple[ModelPair, StoredPair], tmp_path: Path) -> None:
    latents = run(made, tmp_path)["crosscoder_latents"]
    crosscoder, _ = checkpoint.load(tmp_path / "layer2")
    for name, sides in (("encoder_cosine", [each.T for each in crosscoder.encoder_MDF]), ("decoder_cosine", crosscoder.decoder_MFD)):
        expected = torch.nn.functional.cosine_similarity(*(each.double() for each in sides), dim=1)
        np.testing.assert_allclose(latents[name].to_numpy(), expected.numpy(), atol=1e-6)
        assert latents[name].min() < 0.999


def test_progress_shows_what_the_training_comes_to(
    made: tuple[ModelPair, StoredPair], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "diffing_core.progress"):
        run(made, tmp_path)
    [line] = [each for each in caplog.messages if "30 of 30 steps" in each]
    assert all(name in line for name in ("loss", "fvu", "l0", "dead_share", "s left"))


def test_variants_settings_and_corpora_of_one_shape_have_folders_of_their_own(made: tuple[ModelPair, StoredPair], tmp_path: Path) -> None:
    """Defects of the toolkit: a statistics cache keyed by shapes alone; checkpoints keyed by the organism, not its variant."""
    pair, _ = made
    lake, settings = Lake(tmp_path), CrosscoderSettings()
    variant = ModelPair(pair.base, pair.tuned, pair.tokenizer, Pair("m", "o", "strong"), VOCAB, "tuned")
    one, other = corpus("text", 10, 0), corpus("text", 10, 5)
    assert [len(each) for each in one.sequences] != [] and one.content_hash != other.content_hash
    keys = [
        run_key(pair, METHOD, settings).with_corpus(one.name, one.content_hash),
        run_key(pair, METHOD, settings).with_corpus(other.name, other.content_hash),
        run_key(variant, METHOD, settings).with_corpus(one.name, one.content_hash),
        run_key(pair, METHOD, settings.model_copy(update={"seed": 1})).with_corpus(one.name, one.content_hash),
    ]
    assert len({lake.folder(key) for key in keys}) == 4


def test_too_little_text_is_said(made: tuple[ModelPair, StoredPair]) -> None:
    nothing = PairedActivations(made[1].at(0).files, Selection(first_position=100))
    with pytest.raises(NotComputableError, match="fewer than two stored tokens"):
        Sample.of(nothing, seed=0)


def test_held_out_texts_of_which_nothing_is_seen_leave_no_causal_test(
    made: tuple[ModelPair, StoredPair], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pair, _ = made
    n_seen = np.where(FitReading(pair, made[1]).held_out_S(0.1)[:30], 0, 9)
    sequences = tuple(ProbeSequence(np.arange(2, 6 + n).astype(np.int32), *(np.zeros(4 + n, t) for t in (np.int8, bool))) for n in n_seen)
    some = ProbeCorpus("short", sequences, len(sequences), skip_first_tokens=4)
    [written] = paired_pass([pair], some, [(ACTIVATIONS, ACTIVATIONS.settings(layers=None))], store=tmp_path / "store")
    assert written.error is None and not n_seen.all()
    stored = StoredPair(ActivationStore(tmp_path / "store"), *((side.revision, side.dtype) for side in (pair.base, pair.tuned)), (some,))
    tables = run((pair, stored), tmp_path / "run")
    assert not len(tables["crosscoder_causal"]) and "no causal test" in caplog.text
