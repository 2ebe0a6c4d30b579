"""Components of tiny pairs: closed forms, scikit-learn, both ends, and what is left out."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.decomposition import PCA

from diffing_core import activation_pairs
from diffing_core.activation_pairs import StoredPair
from diffing_core.activations import ActivationStore
from diffing_core.comparison import timed_run
from diffing_core.corpus import ROLES, ProbeCorpus, ProbeSequence
from diffing_core.errors import NotComputableError
from diffing_core.methods import get_method
from diffing_core.methods.base import Inputs, Need, Tables
from diffing_core.methods.pca import PcaSettings, findings, headline
from diffing_core.models import ModelPair, Subject
from diffing_core.paired_pass import paired_pass
from diffing_core.pairs import Pair
from tests import model_files
from tests.model_files import VOCAB, WIDTH

PLANTED = 7
SHIFT = 6.0
ROLE = ROLES[1]
QUICK = {"first_position": 0, "steered": 0}
METHOD = get_method("pca")


def corpus(name: str = "probe", seed: int = 0, lengths: tuple[int, ...] = (30, 21, 40, 8), skip: int = 0) -> ProbeCorpus:
    """Random tokens; every third one of the first text is the planted one."""
    draw = np.random.default_rng(seed)
    sequences = [
        ProbeSequence(draw.integers(8, VOCAB, n).astype(np.int32), np.arange(n).astype(np.int8) % 2, np.zeros(n, bool)) for n in lengths
    ]
    sequences[0].token_T[1::3] = PLANTED
    return ProbeCorpus(name, tuple(sequences), len(sequences), skip_first_tokens=skip)


def planted_model() -> tuple[Any, np.ndarray]:
    """A model whose embedding of one token moved along that token's head row; the row, of length 1."""
    model = model_files.build(tie_word_embeddings=False)
    with torch.no_grad():
        direction_D = torch.nn.functional.normalize(model.lm_head.weight[PLANTED], dim=0)
        model.model.embed_tokens.weight[PLANTED] += SHIFT * direction_D
    return model, direction_D.numpy()


def pair_of(base: Any, tuned: Any) -> ModelPair:
    sides = Subject.of(base, revision="base"), Subject.of(tuned, revision="base" if tuned is base else "tuned")
    return ModelPair(*sides, model_files.tokenizer(), Pair("m", "o"), VOCAB)


def stored_of(pair: ModelPair, store: Path, *corpora: ProbeCorpus) -> StoredPair:
    method = get_method("activations")
    for each in corpora:
        [result] = paired_pass([pair], each, [(method, method.settings(layers=None))], store=store)
        assert result.error is None, result.error
    sides = ((side.revision, side.dtype) for side in (pair.base, pair.tuned))
    return StoredPair(ActivationStore(store), *sides, corpora)


def run(pair: ModelPair, stored: StoredPair, **settings) -> Tables:
    chosen = PcaSettings(**(QUICK | settings))
    result = timed_run(pair, METHOD, chosen, Inputs(METHOD, {Need.MODELS: lambda: pair, Need.ACTIVATIONS: lambda: stored}))
    if result.error is not None:
        raise result.error
    return {name: pl.from_arrow(table) for name, table in result.tables.items()} | {"arrow": result.tables}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelPair, StoredPair]:
    pair = pair_of(model_files.build(tie_word_embeddings=False), planted_model()[0])
    return pair, stored_of(pair, tmp_path_factory.mktemp("store"), corpus("one"), corpus("two", seed=1))


def vectors(stored: StoredPair, layer: int, target: str) -> np.ndarray:
    return torch.cat([getattr(rows, f"{target}_ND").double() for rows in stored.at(layer).blocks()]).numpy()


def test_progress_counts_the_rows_that_are_read(made: tuple[ModelPair, StoredPair], monkeypatch: pytest.MonkeyPatch) -> None:
    """Position 0 is left out by default, and outliers may be: the last line would never come."""
    told: list[list[int]] = []

    @contextmanager
    def counted(total: int, *_: str) -> Iterator[Callable[[int], None]]:
        steps: list[int] = []
        yield steps.append
        told.append([total, sum(steps)])

    monkeypatch.setattr(activation_pairs, "track", counted)
    run(*made, outlier_ratio=1.05)
    assert len(told) >= 2 * len(made[1].layers), "each layer is read for its components and for their ends"
    assert all(total == read > 0 for total, read in told)


@pytest.mark.parametrize("target", ["difference", "base", "tuned"])
def test_components_are_those_of_scikit_learn_on_the_stored_rows(made: tuple[ModelPair, StoredPair], target: str) -> None:
    """Of the rows that were asked for: the toolkit's loader ignored its target."""
    pair, stored = made
    tables = run(pair, stored)
    for layer in stored.layers:
        rows_ND = vectors(stored, layer, target)
        known = PCA(svd_solver="full").fit(rows_ND)
        found = tables["pca_components"].filter((pl.col("layer") == layer) & (pl.col("target") == target))
        n = len(found)
        assert found["component"].to_list() == [*range(1, n + 1)]
        np.testing.assert_allclose(found["explained_share"], known.explained_variance_ratio_[:n], atol=1e-6)
        np.testing.assert_allclose(found["cumulative_share"], np.cumsum(known.explained_variance_ratio_)[:n], atol=1e-6)
        np.testing.assert_allclose(found["variance"], known.explained_variance_[:n] * (len(rows_ND) - 1) / len(rows_ND), rtol=1e-4, atol=1e-8)
        leading = known.explained_variance_ratio_[:n] > 1e-4  # below, float32 rows leave the directions open
        vector_KD = np.stack(found["vector"].to_list())
        np.testing.assert_allclose(vector_KD[leading], known.components_[:n][leading], atol=1e-3)
        fit = tables["pca_fits"].filter((pl.col("layer") == layer) & (pl.col("target") == target)).to_dicts()[0]
        assert fit["n_tokens"] == len(rows_ND)
        np.testing.assert_allclose(fit["mean"], known.mean_, atol=1e-5)
        assert fit["mean_norm"] == pytest.approx(np.linalg.norm(known.mean_), rel=1e-4)
        assert fit["total_variance"] == pytest.approx(rows_ND.var(0).sum(), rel=1e-6)
        spectrum = known.explained_variance_
        assert fit["effective_dimension"] == pytest.approx(spectrum.sum() ** 2 / np.square(spectrum).sum(), rel=1e-5)


def test_mean_coordinate_and_skewness_are_those_of_the_rows(made: tuple[ModelPair, StoredPair]) -> None:
    pair, stored = made
    rows = run(pair, stored, layers=(1,))["pca_components"]
    delta_ND = vectors(stored, 1, "difference")
    for row in rows.filter((pl.col("target") == "difference") & (pl.col("component") <= 2)).to_dicts():
        coordinate_N = delta_ND @ np.asarray(row["vector"], float)
        assert row["mean_coordinate"] == pytest.approx(coordinate_N.mean(), rel=1e-3, abs=1e-5)
        centred_N = coordinate_N - coordinate_N.mean()
        assert row["skewness"] == pytest.approx((centred_N**3).mean() / centred_N.std() ** 3, rel=1e-3)
    assert rows.filter(pl.col("target") != "difference")["skewness"].null_count() == len(rows.filter(pl.col("target") != "difference"))


def test_uncentred_components_are_the_singular_vectors_of_the_rows(made: tuple[ModelPair, StoredPair]) -> None:
    pair, stored = made
    delta_ND = vectors(stored, 1, "difference")
    _, singular_K, right_KD = np.linalg.svd(delta_ND, full_matrices=False)
    tables = run(pair, stored, layers=(1,), centred=False)
    first = tables["pca_components"].filter((pl.col("target") == "difference") & (pl.col("component") == 1)).to_dicts()[0]
    assert first["variance"] == pytest.approx(singular_K[0] ** 2 / len(delta_ND), rel=1e-6)
    assert abs(np.dot(first["vector"], right_KD[0])) == pytest.approx(1, abs=1e-6)
    assert first["mean_coordinate"] == pytest.approx(float(delta_ND.mean(0) @ np.asarray(first["vector"])), rel=1e-4)


def test_the_planted_direction_is_first_its_token_shown_and_its_texts_at_the_far_end(tmp_path: Path) -> None:
    model, direction_D = planted_model()
    pair = pair_of(model_files.build(tie_word_embeddings=False), model)
    tables = run(pair, stored_of(pair, tmp_path, corpus()))
    first = tables["pca_components"].filter((pl.col("target") == "difference") & (pl.col("component") == 1) & (pl.col("layer") == 0))
    vector_D, skewness = np.asarray(first["vector"][0]), first["skewness"][0]
    assert abs(vector_D @ direction_D) > 0.9
    assert vector_D[np.abs(vector_D).argmax()] > 0
    assert np.sign(skewness) == np.sign(vector_D @ direction_D), "the few moved tokens are the far end"
    far = "positive" if skewness > 0 else "negative"
    examples = tables["pca_examples"].filter((pl.col("layer") == 0) & (pl.col("component") == 1) & (pl.col("end") == far))
    best = examples.sort("rank").to_dicts()[0]
    assert best["sequence"] == 0
    assert best["tokens"][best["position"] - best["first_position"]].strip() == f"w{PLANTED}"
    shown = findings(tables["arrow"], PcaSettings(shown_layers=(0,)))
    assert shown[0].item.strip() == f"w{PLANTED}"
    assert 0 < shown[0].score <= first["explained_share"][0]
    tokens = [finding.item for finding in shown if finding.kind == "token"]
    assert len(tokens) == len(set(tokens)) == PcaSettings().shown
    texts = [finding for finding in shown if finding.kind == "text_snippet"]
    assert texts[0].source_key["end"] == far
    assert f"w{PLANTED}w" in f"{texts[0].item}w"
    assert shown.index(texts[0]) > max(index for index, finding in enumerate(shown) if finding.kind == "token")


def test_both_ends_of_a_component_have_texts_of_opposite_coordinates(made: tuple[ModelPair, StoredPair]) -> None:
    """The toolkit projected texts with the sign of the difference swapped against training."""
    pair, stored = made
    tables = run(pair, stored, layers=(1,), example_targets=("difference", "tuned"))
    for target in ("difference", "tuned"):
        rows_ND = vectors(stored, 1, target)
        vector_D = np.asarray(
            tables["pca_components"].filter((pl.col("target") == target) & (pl.col("component") == 1))["vector"][0], float
        )
        coordinate_N = (rows_ND - rows_ND.mean(0)) @ vector_D
        ends = tables["pca_examples"].filter((pl.col("target") == target) & (pl.col("component") == 1) & (pl.col("rank") == 1))
        best = dict(zip(ends["end"], ends["score"], strict=True))
        assert best["positive"] == pytest.approx(coordinate_N.max(), rel=1e-3)
        assert best["negative"] == pytest.approx(-coordinate_N.min(), rel=1e-3)
    assert set(tables["pca_examples"]["sequence"]) & {4, 5, 6, 7}, "sequences are counted through both corpora"


def test_swapping_the_models_turns_the_ends_and_the_tokens_round(tmp_path: Path) -> None:
    base, tuned = model_files.build(tie_word_embeddings=False), planted_model()[0]
    tables = []
    for name, (one, two) in {"forth": (base, tuned), "back": (tuned, base)}.items():
        pair = pair_of(one, two)
        tables.append(run(pair, stored_of(pair, tmp_path / name, corpus()), layers=(0,), targets=("difference",)))
    forth, back = (each["pca_components"] for each in tables)
    np.testing.assert_array_equal(np.stack(forth["vector"].to_list()), np.stack(back["vector"].to_list()))
    np.testing.assert_allclose(forth["skewness"].drop_nulls(), -back["skewness"].drop_nulls(), rtol=1e-5)
    key = ["component", "rank"]
    positive, negative = (
        each["pca_examples"].filter(pl.col("end") == end).sort(key)["score"] for each, end in zip(tables, ("positive", "negative"), strict=True)
    )
    np.testing.assert_allclose(positive, negative, rtol=1e-5)


def test_identical_models_have_no_component_of_the_difference(tmp_path: Path) -> None:
    model = model_files.build()
    pair = pair_of(model, model)
    tables = run(pair, stored_of(pair, tmp_path, corpus()), steered=2, steering_layers=None)
    assert set(tables["pca_components"]["target"]) == {"base", "tuned"}
    assert tables["pca_fits"].filter(pl.col("target") == "difference")["relative_variance"].to_list() == [0] * pair.base.n_layers
    assert len(tables["pca_examples"]) == len(tables["pca_steering"]) == 0
    assert findings(tables["arrow"], PcaSettings()) == []
    assert headline(tables["arrow"])["relative_variance"] == 0


def test_rows_that_are_not_selected_move_no_component_and_leave_texts_whole(made: tuple[ModelPair, StoredPair]) -> None:
    pair, stored = made
    tables = run(pair, stored, layers=(1,), first_position=4, roles=(ROLE,))
    keep_N = np.concatenate([(rows.position_N >= 4) & (rows.role_N == ROLES.index(ROLE)) for rows in stored.at(1).blocks()])
    known = PCA(3).fit(vectors(stored, 1, "difference")[keep_N])
    found = tables["pca_components"].filter((pl.col("target") == "difference") & (pl.col("component") <= 3))
    np.testing.assert_allclose(found["explained_share"], known.explained_variance_ratio_, rtol=1e-4)
    for example in tables["pca_examples"].to_dicts():
        whole = [*corpus("one").sequences, *corpus("two", seed=1).sequences][example["sequence"]]
        assert len(example["values"]) == len(example["tokens"]) == len(whole)
        value_T = np.asarray(example["values"])
        assert not value_T[(np.arange(len(whole)) < 4) | (whole.role_T != ROLES.index(ROLE))].any()
        assert value_T[example["position"]] == pytest.approx(example["score"])


def test_steering_writes_both_ends_beside_the_plain_text(made: tuple[ModelPair, StoredPair]) -> None:
    pair, stored = made
    settings = {"steered": 1, "steering_prompts": ("doc: w9",), "steering_tokens": 5, "steering_strengths": (8.0,), "steering_layers": (1,)}
    rows = run(pair, stored, targets=("difference",), **settings)["pca_steering"]
    assert rows.select("layer", "component", "end").rows() == [(1, 1, "positive"), (1, 1, "negative")]
    assert len(set(rows["text"])) == 2
    assert len(set(rows["plain_text"])) == 1


def test_pairs_of_one_shape_on_one_corpus_share_nothing(tmp_path: Path) -> None:
    """The toolkit keyed statistics of differences by the shapes of its caches: the second pair read those of the first."""
    base, other = model_files.build(tie_word_embeddings=False), planted_model()[0]
    with torch.no_grad():
        other.model.embed_tokens.weight[PLANTED + 1] += 1
    fits = []
    for name, tuned in (("one", planted_model()[0]), ("two", other)):
        sides = Subject.of(base, revision="base"), Subject.of(tuned, revision=name)
        pair = ModelPair(*sides, model_files.tokenizer(), Pair("m", "o"), VOCAB)
        stored = stored_of(pair, tmp_path, corpus())
        fits.append(run(pair, stored)["pca_fits"].filter((pl.col("target") == "difference") & (pl.col("layer") == 1))["mean"][0].to_list())
        np.testing.assert_allclose(fits[-1], vectors(stored, 1, "difference").mean(0), atol=1e-5)
    assert fits[0] != fits[1]


def test_a_layer_that_is_not_stored_is_refused(made: tuple[ModelPair, StoredPair]) -> None:
    pair, stored = made
    missing = replace(stored, base=("elsewhere", stored.base[1]))
    with pytest.raises(NotComputableError, match="no layer is stored for both models"):
        run(pair, missing)


def test_findings_are_of_the_deepest_block_read_or_of_those_named(made: tuple[ModelPair, StoredPair]) -> None:
    pair, stored = made
    tables = run(pair, stored, layers=(0, 1))
    for settings, layers in ((PcaSettings(), {1}), (PcaSettings(shown_layers=(0,)), {0}), (PcaSettings(shown_layers=(0, 1)), {0, 1})):
        assert {finding.layer for finding in findings(tables["arrow"], settings)} == layers
    with pytest.raises(NotComputableError, match=r"shown_layers names block\(s\) \[2\], but \[0, 1\] are read"):
        run(pair, stored, layers=(0, 1), shown_layers=(1.0,))


def test_listed_components_are_no_more_than_asked_for(made: tuple[ModelPair, StoredPair]) -> None:
    pair, stored = made
    for asked, expected in ((3, 3), (None, WIDTH)):
        tables = run(pair, stored, components=asked, read_components=2, layers=(1,), targets=("tuned",))
        assert len(tables["pca_components"]) == expected
        assert set(tables["pca_tokens"]["component"]) == {1, 2}
        assert headline(tables["arrow"]) == {"n_fits": 1}


def test_no_token_left_is_said_and_is_not_a_result_without_findings(made: tuple[ModelPair, StoredPair]) -> None:
    with pytest.raises(NotComputableError, match="no stored token of layer 0 is left to read"):
        run(*made, first_position=100)
