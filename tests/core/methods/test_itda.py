"""ITDA on planted checkpoints: whose tokens become atoms, what tuning adds, and what it does."""

import gc
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffing_core import pursuit
from diffing_core.activation_pairs import StoredPair
from diffing_core.activations import ActivationStore
from diffing_core.corpus import ROLES, ProbeCorpus, ProbeSequence
from diffing_core.errors import NotComputableError
from diffing_core.fit_reading import FitReading
from diffing_core.itda_dictionary import Dictionary, Staged, unit
from diffing_core.methods import get_method
from diffing_core.methods.base import Inputs, Need, Tables
from diffing_core.methods.itda import exceeds_null, layer_dictionary, running
from diffing_core.methods.itda.ablation import Ablation, Behaviour, ablation_rows
from diffing_core.methods.itda.layer_tables import LayerResult
from diffing_core.methods.itda.material import Chosen, Material
from diffing_core.methods.itda.new_atoms import clusters
from diffing_core.methods.itda.settings import ItdaSettings
from diffing_core.methods.itda.similarity import Compared, similarity_rows
from diffing_core.methods.itda.usage import Usage, mean_l0
from diffing_core.models import ModelPair, Subject
from diffing_core.paired_pass import paired_pass
from diffing_core.pairs import Pair
from diffing_core.pursuit import Pursuit
from diffing_core.stats import sign_tests
from tests import model_files

METHOD, ACTIVATIONS = get_method("itda"), get_method("activations")
PLANTED, BOS = 7, 3
SETTINGS = ItdaSettings(min_cosine=0.97, steps=3, max_tokens=300, held_out_tokens=200, ablated_tokens=100, resamples=200)


def probe(name: str, seed: int, n_sequences: int = 24) -> ProbeCorpus:
    """Random tokens behind a beginning-of-sequence token; every third text has the planted one."""
    draw = np.random.default_rng(seed)
    sequences = []
    for number in range(n_sequences):
        token_T = draw.integers(8, model_files.VOCAB, draw.integers(6, 16)).astype(np.int32)
        token_T[0] = BOS
        if number % 3 == 0:
            token_T[[2, 4]] = PLANTED
        sequences.append(ProbeSequence(token_T, np.zeros(len(token_T), np.int8), np.zeros(len(token_T), bool)))
    return ProbeCorpus(name, tuple(sequences), n_sequences)


def turned(sequence: ProbeSequence) -> ProbeSequence:
    """Another text of the same shape."""
    token_T = sequence.token_T.copy()
    token_T[1:] = token_T[:0:-1]
    return replace(sequence, token_T=token_T)


class Case:
    """A pair whose tuned side turns one token's embedding toward a new direction, with its stored activations."""

    def __init__(self, store: Path, strength: float, corpora: tuple[ProbeCorpus, ...] = ()) -> None:
        base, tuned = (model_files.build(tie_word_embeddings=False) for _ in range(2))
        with torch.no_grad():
            tuned.model.embed_tokens.weight[PLANTED] += strength * base.lm_head.weight[PLANTED + 1]
        tokenizer = model_files.tokenizer()
        tokenizer.bos_token = f"w{BOS}"
        sides = [Subject.of(model, revision=f"{name}{strength}") for name, model in (("base", base), ("tuned", tuned))]
        self.pair = ModelPair(*sides, tokenizer, Pair("m", "o"), model_files.VOCAB)
        corpora = corpora or (probe("one", 0), probe("two", 1))
        for corpus in corpora:
            [written] = paired_pass([self.pair], corpus, [(ACTIVATIONS, ACTIVATIONS.settings(layers=None))], store=store)
            assert written.error is None, written.error
        self.stored = StoredPair(ActivationStore(store), *((side.revision, side.dtype) for side in sides), corpora)
        self.reading = FitReading(self.pair, self.stored)

    def tables(self, folder: Path, **settings: object) -> Tables:
        suppliers = {Need.MODELS: lambda: self.pair, Need.ACTIVATIONS: lambda: self.stored, Need.FOLDER: lambda: folder}
        folder.mkdir(exist_ok=True)
        return METHOD.run(Inputs(METHOD, suppliers), SETTINGS.model_copy(update=settings))

    def chosen(self, **settings: object) -> Chosen:
        return Chosen(self.stored, self.reading, [BOS], SETTINGS.model_copy(update=settings))


def staged_of(whole: Dictionary, n_base: int) -> Staged:
    return Staged(whole, n_base, (n_base,), np.zeros(0, np.int64))


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("planted"), 3.0)


@pytest.fixture(scope="module")
def tables(planted: Case, tmp_path_factory: pytest.TempPathFactory) -> Tables:
    return planted.tables(tmp_path_factory.mktemp("run"))


def frame(tables: Tables, name: str) -> pl.DataFrame:
    return pl.from_arrow(tables[f"itda_{name}"])


def answered(n_texts: int, n_answer: int) -> ProbeCorpus:
    """Texts of 20 tokens, of which the last few are an answer."""
    draw = np.random.default_rng(0)
    role_T = np.where(np.arange(20) >= 20 - n_answer, ROLES.index("assistant"), 0).astype(np.int8)
    tokens = draw.integers(8, model_files.VOCAB, (n_texts, 20)).astype(np.int32)
    return ProbeCorpus(f"answers{n_answer}", tuple(ProbeSequence(each_T, role_T, np.zeros(20, bool)) for each_T in tokens), n_texts)


def test_as_many_tokens_are_taken_as_asked_for_whatever_the_roles(tmp_path: Path) -> None:
    """Most texts have no answer: sizes count what is chosen, not what lies beside it."""
    case = Case(tmp_path, 3.0, (answered(60, 0), answered(60, 4)))
    settings = {"roles": ("assistant",), "max_tokens": 120, "held_out_tokens": 20, "outlier_ratio": 1e9}
    fit, held_out = case.chosen(**settings).read(case.stored.at(1))
    assert len(fit) == 120
    assert len(held_out) == 20
    with pytest.raises(NotComputableError, match=r"no token of the stored texts is left .* roles \('tool',\)"):
        case.chosen(**settings | {"roles": ("tool",)}).read(case.stored.at(1))


def test_new_atoms_are_tokens_that_tuning_touched(tables: Tables) -> None:
    """Only tokens at and after the planted one differ, and only in every third text: nothing else can be new."""
    atoms = frame(tables, "atoms").filter(pl.col("stage") == "tuned")
    assert len(atoms) >= 3 and set(atoms["sequence"] % 3) == {0} and atoms["position"].min() >= 2
    new = frame(tables, "new_atoms")
    assert all(f"«{row['token']}»" in row["snippet"] for row in new.to_dicts())
    planted = new.filter((pl.col("layer") == 0) & (pl.col("token") == f"w{PLANTED}"))
    assert len(planted) and planted["energy"].sum() > planted["base_energy"].sum()
    layers = frame(tables, "layers")
    assert (layers["excess_atoms"] == layers["tuned_atoms"] - layers["null_atoms"]).all()
    assert (layers["excess_atoms"] > 0).all()


def test_the_rotation_map_points_at_the_planted_token(tables: Tables) -> None:
    atoms = frame(tables, "atoms").filter((pl.col("layer") == 0) & (pl.col("stage") == "base"))
    turned = atoms.group_by("token").agg(pl.col("rotation").mean()).sort("rotation", descending=True)
    assert turned["token"][0] == f"w{PLANTED}" and turned["rotation"][0] > 3 * turned["rotation"][1]


def test_the_token_that_was_written_into_the_stream_is_found_first(tables: Tables) -> None:
    found = METHOD.findings(tables, SETTINGS)
    assert found[0].item.strip() == f"w{PLANTED + 1}" and found[0].kind == "token"
    assert {finding.kind for finding in found} == {"token", "text_snippet"}


def test_tokens_left_out_never_become_atoms(planted: Case, tables: Tables) -> None:
    atoms = frame(tables, "atoms")
    assert f"w{BOS}" not in set(atoms["token"]) and atoms["position"].min() >= 1
    material, held_out = planted.chosen(first_position=0).read(planted.stored.at(0))
    assert material.n_left_out > 0 and held_out.n_left_out > 0
    assert BOS not in material.rows.token_N and BOS not in held_out.rows.token_N


def test_fitted_and_held_out_texts_share_none_and_layers_share_their_tokens(planted: Case) -> None:
    chosen = planted.chosen(max_tokens=100)
    parts = [chosen.read(planted.stored.at(layer)) for layer in planted.stored.layers]
    for material, held_out in parts:
        assert len(material) <= 100
        assert not set(material.sequence_N) & set(held_out.sequence_N)
        np.testing.assert_array_equal(material.place_N, parts[0][0].place_N)
    again, _ = planted.chosen(max_tokens=50).read(planted.stored.at(0))
    assert set(again.place_N) <= set(parts[0][0].place_N)


def test_identical_models_add_nothing_and_show_nothing(tmp_path: Path) -> None:
    same = Case(tmp_path, 0.0).tables(tmp_path)
    assert all(frame(same, name).is_empty() for name in ("new_atoms", "tokens", "lens", "examples", "patterns", "ablations"))
    assert not frame(same, "layers").select("new_atoms", "excess_atoms", "mean_rotation", "excess_fvu").to_numpy().any()
    assert not frame(same, "atoms").select("rotation", "published_delta").to_numpy().any()
    alike = frame(same, "similarity").filter((pl.col("side") == "base") & (pl.col("other_side") == "tuned"))
    own = alike.filter(pl.col("layer") == pl.col("other_layer"))
    assert own["jaccard"].to_list() == [1.0] * len(own) and own["linear_cka"].to_list() == pytest.approx([1.0] * len(own))
    assert METHOD.findings(same, SETTINGS) == []


def test_findings_are_held_back_where_the_count_does_not_exceed_the_null() -> None:
    row = {"excess_atoms": 3, "tuned_documents": 4, "null_documents": 2}
    assert exceeds_null(row)
    assert not exceeds_null(row | {"excess_atoms": 0})
    assert not exceeds_null(row | {"excess_atoms": -1})
    assert not exceeds_null(row | {"null_documents": 4})


def test_the_published_ordering_is_the_mean_coefficient_difference(planted: Case) -> None:
    """Over an orthonormal dictionary with a step per atom, coefficients are coordinates of the unit vectors."""
    _, held_out = planted.chosen().read(planted.stored.at(1))
    width = held_out.base_ND.shape[1]
    whole = Dictionary(torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(0)))[0], np.arange(width))
    usage = Usage(held_out, staged_of(whole, width), ItdaSettings(steps=width).encoder)
    delta_I, significance = usage.published_delta()
    expected_NI = (unit(held_out.tuned_ND) - unit(held_out.base_ND)) @ whole.atom_ID.T
    np.testing.assert_allclose(delta_I, expected_NI.double().mean(0).numpy(), atol=1e-5)
    documents = [expected_NI[held_out.sequence_N == each].sum(0) for each in np.unique(held_out.sequence_N)]
    differs = [document for document in documents if document.abs().max() > 1e-6]
    np.testing.assert_array_less(sign_tests(len(differs), 0) - 1e-12, significance.p_I)
    assert usage.fvu("tuned", usage.in_base_atoms["tuned"], width) < 1e-6


def test_the_published_ordering_is_of_plain_matching_pursuit(planted: Case) -> None:
    """Defect: it was read from the orthogonal codes, whose coefficients are solved anew at every step."""
    _, held_out = planted.chosen().read(planted.stored.at(1))
    atoms = unit(torch.randn(40, held_out.base_ND.shape[1], generator=torch.Generator().manual_seed(0)))
    found = staged_of(Dictionary(atoms, np.arange(40)), 40)

    def mean_I(side: str, orthogonal: bool) -> np.ndarray:
        return Pursuit(4, orthogonal).encode(unit(getattr(held_out, f"{side}_ND")), atoms).dense(40).double().mean(0).numpy()

    delta_I, _ = Usage(held_out, found, Pursuit(4)).published_delta()
    np.testing.assert_allclose(delta_I, mean_I("tuned", False) - mean_I("base", False), atol=1e-12)
    assert np.abs(delta_I - (mean_I("tuned", True) - mean_I("base", True))).max() > 1e-3


def test_codes_made_dense_in_parts_say_the_same(planted: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    _, held_out = planted.chosen().read(planted.stored.at(1))
    atoms = unit(torch.randn(40, held_out.base_ND.shape[1], generator=torch.Generator().manual_seed(0)))
    found = staged_of(Dictionary(atoms, np.arange(40)), 30)

    def said() -> list[np.ndarray]:
        usage = Usage(held_out, found, Pursuit(4))
        parts = [usage.energy("tuned", found.new_I), usage.share_used("base", found.new_I), usage.sizes("tuned", found.new_I)]
        parts += [usage.significance(found.new_I).p_I, usage.published_delta()[0], usage.published_delta()[1].p_I]
        whole, base = usage.in_all_atoms["tuned"], usage.in_base_atoms["base"]
        return [*parts, usage.fvu("base", base, 30), usage.difference_fvu(atoms), mean_l0(whole, 40)]

    together = said()
    monkeypatch.setattr(pursuit, "VALUES_TOGETHER", 40 * 7)
    assert len(list(Usage(held_out, found, Pursuit(4)).in_all_atoms["tuned"].parts(40))) > 5
    for one, other in zip(together, said(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-9)


def test_sign_tests_are_binomial() -> None:
    np.testing.assert_allclose(sign_tests([5, 3, 0, 4], [0, 3, 0, 1]), [2 / 32, 1, 1, 12 / 32])


def test_new_atoms_make_up_more_of_the_tuned_model_and_are_ranked_by_it(tables: Tables) -> None:
    new = frame(tables, "new_atoms").sort("layer", "rank")
    for _, layer in new.group_by("layer", maintain_order=True):
        assert layer["energy"].is_sorted(descending=True)
        assert layer["energy"].sum() > layer["base_energy"].sum()
        assert set(layer["cluster"]) <= set(layer["atom"])


def test_clusters_are_led_by_the_first_atom_that_none_before_is_like() -> None:
    angle_A = torch.tensor([0.0, 0.3, 0.6, 1.6, 1.5])
    vector_AD = torch.stack([angle_A.cos(), angle_A.sin()], 1)
    assert clusters(vector_AD, float(np.cos(0.35))).tolist() == [0, 0, 2, 3, 3]


def test_the_layer_that_is_edited_is_the_layer_that_was_stored(planted: Case) -> None:
    """Defect: the published code built on a block's output and, on Hugging Face models, compared the block before."""
    documents = [0, 3]
    for layer in planted.stored.layers:
        states = []
        with torch.inference_mode():
            behaviour = Behaviour(planted.reading, documents)
            unchanged_S = behaviour.kl_without(layer, lambda _, __, hidden_BTD, states=states: states.append(hidden_BTD) or 0 * hidden_BTD)
        np.testing.assert_allclose(unchanged_S, behaviour.kl_S)
        lengths = [len(planted.reading.context.corpus.sequences[document]) for document in documents]
        [state_BTD] = states
        seen = {
            (int(sequence), int(position)): vector_D
            for rows in planted.stored.at(layer).blocks()
            for sequence, position, vector_D in zip(planted.reading.sequence_N(rows), rows.position_N, rows.tuned_ND, strict=True)
        }
        for row, place in enumerate(np.argsort([-length for length in lengths], kind="stable")):
            for position in range(lengths[place]):
                torch.testing.assert_close(state_BTD[row, position], seen[documents[place], position], atol=1e-5, rtol=1e-5)


def every_token_an_atom(planted: Case, layer: int) -> tuple[Staged, Material]:
    """Of three texts: each token's own code is itself, and turned back it is the base's vector."""
    [rows, *_] = planted.stored.at(layer).blocks()
    rows = rows.take(np.flatnonzero(np.isin(rows.sequence_N, (0, 3, 6))))
    return Staged(Dictionary(unit(rows.tuned_ND), np.arange(len(rows))), 0, (0,), np.zeros(0, np.int64)), Material(rows, rows.sequence_N, 0, 0)


def test_turning_everything_back_removes_the_difference(planted: Case) -> None:
    layer = planted.stored.layers[0]
    found, material = every_token_an_atom(planted, layer)
    left = []
    with torch.inference_mode():
        behaviour = Behaviour(planted.reading, [0, 3, 6])
        ablation = Ablation(found, material, material, SETTINGS.model_copy(update={"steps": 1}))
        back = behaviour.kl_without(layer, partial(ablation.taken, found.new_I, "turned_back"))

        def gone(number: int, place_BT: np.ndarray, hidden_BTD: torch.Tensor) -> torch.Tensor:
            taken_BTD = ablation.taken(found.new_I, "omitted", number, place_BT, hidden_BTD)
            left.append((taken_BTD - hidden_BTD)[torch.from_numpy(np.isin(place_BT, material.place_N))])
            return taken_BTD

        behaviour.kl_without(layer, gone)
    assert behaviour.kl_S.sum() > 0.01
    assert back.sum() < 1e-3 * behaviour.kl_S.sum()
    assert sum(map(len, left)) == len(material) and all(each.abs().max() < 1e-3 for each in left)


def test_tokens_that_were_never_encoded_are_not_edited(planted: Case) -> None:
    """Defect: only those before the first position were spared, not special ones nor those of outlying norm."""
    layer = planted.stored.layers[0]
    found, material = every_token_an_atom(planted, layer)
    encoded = np.flatnonzero((material.rows.token_N != BOS) & (material.rows.position_N != 4))
    held_out = Material(material.rows.take(encoded), material.sequence_N[encoded], len(material) - len(encoded), 0)
    seen = 0
    with torch.inference_mode():
        ablation = Ablation(found, material, held_out, SETTINGS.model_copy(update={"steps": 1, "first_position": 0}))

        def check(number: int, place_BT: np.ndarray, hidden_BTD: torch.Tensor) -> torch.Tensor:
            nonlocal seen
            taken_BTD = ablation.taken(found.new_I, "omitted", number, place_BT, hidden_BTD)
            edited_BT = taken_BTD.abs().sum(-1).numpy() > 0
            np.testing.assert_array_equal(edited_BT, np.isin(place_BT, held_out.place_N))
            seen += int(edited_BT.sum())
            return taken_BTD

        Behaviour(planted.reading, [0, 3, 6]).kl_without(layer, check)
    assert 0 < seen == len(held_out) < len(material)


def test_behaviour_holds_nothing_as_wide_as_the_vocabulary(planted: Case) -> None:
    with torch.inference_mode():
        behaviour = Behaviour(planted.reading, [0, 3, 6])
    assert [each.shape[-1] for each in behaviour._base] == [planted.reading.context.d_model] * behaviour.n_batches


def test_no_layer_is_held_while_the_next_is_made(planted: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Defect: vectors and codes of all layers were held to the end."""
    made, alive = [], []

    def watched(*given: object) -> LayerResult:
        gc.collect()
        alive.append(sum(each() is not None for each in made))
        result = LayerResult(*given)
        made.append(weakref.ref(result))
        return result

    monkeypatch.setattr(running, "LayerResult", watched)
    planted.tables(tmp_path)
    assert alive == [0, 0, 0]


def test_shares_removed_and_their_intervals(planted: Case) -> None:
    class Half:
        kl_S, n_tokens = np.array([4.0, 2.0, 2.0]), 4

    from diffing_core.methods.itda.ablation import Effect

    effects = [Effect("new", "omitted", 5, Half.kl_S / 2), Effect("random", "omitted", 5, Half.kl_S)]
    new, random = ablation_rows(effects, Half, SETTINGS)
    assert (new["kl_nats"], new["ablated_kl_nats"]) == (2.0, 1.0)
    assert [new[name] for name in ("removed", "removed_low", "removed_high", "beyond_random")] == pytest.approx([0.5] * 4)
    assert (random["removed"], random["beyond_random"]) == (0.0, 0.0)

    class Same:
        kl_S, n_tokens = np.zeros(3), 4

    assert ablation_rows(effects, Same, SETTINGS) == []


def test_a_second_run_reads_what_the_first_one_kept(planted: Case, tables: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted.tables(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"layer_{layer}.{ending}" for layer in planted.stored.layers for ending in ("json", "safetensors")
    ]
    (tmp_path / "layer_2.json").unlink()  # interrupted between the two files of a layer: that layer is built again
    built = []
    monkeypatch.setattr(layer_dictionary, "build", lambda *given, build=layer_dictionary.build: built.append(1) or build(*given))
    again = planted.tables(tmp_path)
    assert len(built) == 1
    assert all(again[name].equals(table) for name, table in tables.items())


def test_an_interrupted_construction_leaves_no_half_file(planted: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(layer_dictionary, "staged", interrupted)
    with pytest.raises(KeyboardInterrupt):
        planted.tables(tmp_path)
    assert list(tmp_path.iterdir()) == []


def kept_atoms(folder: Path) -> torch.Tensor:
    return load_file(folder / "layer_0.safetensors")["atom"]


def test_a_dictionary_built_otherwise_is_built_anew(planted: Case, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fresh = planted.tables(tmp_path / "fresh", layers=(0,), min_cosine=0.7)
    planted.tables(tmp_path / "used", layers=(0,))
    assert "built anew" not in caplog.text
    again = planted.tables(tmp_path / "used", layers=(0,), min_cosine=0.7)
    assert "layer_0.safetensors was built from other activations" in caplog.text
    assert all(again[name].equals(table) for name, table in fresh.items())


def test_variants_and_corpora_of_one_shape_never_share_a_dictionary(planted: Case, tmp_path: Path) -> None:
    """Defect: the toolkit's checkpoint and results folders are named by organism without variant, and some results by the last
    part of a data set's name, so that one reads or overwrites the other's. Here even one folder for all of them mixes nothing."""
    variant = Case(tmp_path / "variant", 2.0)
    corpora = planted.stored.corpora
    shaped = tuple(replace(corpus, sequences=tuple(map(turned, corpus.sequences))) for corpus in corpora)
    assert [len(each) for each in shaped[0].sequences] == [len(each) for each in corpora[0].sequences]
    other_texts = Case(tmp_path / "texts", 3.0, shaped)
    planted.tables(tmp_path / "shared", layers=(0,))
    for number, case in enumerate((variant, other_texts, planted)):
        before = kept_atoms(tmp_path / "shared")
        shared, own = case.tables(tmp_path / "shared", layers=(0,)), case.tables(tmp_path / str(number), layers=(0,))
        assert all(shared[name].equals(table) for name, table in own.items())
        assert not torch.equal(before, kept_atoms(tmp_path / "shared"))


@pytest.mark.parametrize("name", ["corpus", "sequence", "position"])
def test_atoms_of_other_tokens_are_built_anew(planted: Case, tmp_path: Path, name: str) -> None:
    """Defect: the position alone was checked."""
    planted.tables(tmp_path, layers=(0,))
    path = tmp_path / "layer_0.safetensors"
    held = load_file(path)
    save_file(held | {name: held[name] + 1}, path)
    planted.tables(tmp_path, layers=(0,))
    assert torch.equal(load_file(path)[name], held[name])


def test_layers_that_are_not_stored_and_too_few_texts_are_said(planted: Case, tmp_path: Path) -> None:
    with pytest.raises(NotComputableError, match="held out"):
        planted.tables(tmp_path, held_out_share=1e-9)
    missing = StoredPair(planted.stored.store, planted.stored.base, planted.stored.tuned, planted.stored.corpora)
    assert missing.layers == (0, 1, 2)
    with pytest.raises(Exception, match="layer"):
        planted.tables(tmp_path, layers=(9,))


def test_patterns_run_along_the_source_and_peak_at_the_atom(tables: Tables) -> None:
    patterns = frame(tables, "patterns")
    at_source = patterns.filter(pl.col("place") == 0)
    listed = frame(tables, "new_atoms").filter(pl.col("rank") <= SETTINGS.listed_atoms)
    assert len(at_source) == len(listed)
    np.testing.assert_allclose(at_source["tuned"], 1.0, atol=1e-3)  # an atom expresses its own token alone
    assert patterns["place"].abs().max() <= SETTINGS.context_tokens
    assert patterns.filter(pl.col("place") != 0)["tuned"].mean() < 0.5


def test_similarity_has_every_two_layers_and_a_noise_floor(tables: Tables) -> None:
    rows = frame(tables, "similarity")
    assert len(rows) == 6 * 7 // 2 + 3
    own = rows.filter(pl.col("name") == pl.col("other_name"))
    assert own["jaccard"].to_list() == [1.0] * 6 and own["linear_cka"].to_list() == pytest.approx([1.0] * 6)
    assert rows.filter(pl.col("other_side") == "base_reordered")["linear_cka"].null_count() == 3


def test_examples_come_from_held_out_texts(planted: Case, tables: Tables) -> None:
    _, held_out = planted.chosen().read(planted.stored.at(0))
    examples = frame(tables, "examples")
    assert len(examples) and set(examples["sequence"]) <= set(held_out.sequence_N.tolist())


def test_the_headline_says_how_many_layers_are_most_like_themselves(tables: Tables, planted: Case, tmp_path: Path) -> None:
    rows = frame(tables, "similarity").filter(pl.concat_list("side", "other_side").list.n_unique() == 2)
    rows = rows.filter(pl.col("other_side") != "base_reordered").with_columns(
        base=pl.when(pl.col("side") == "base").then("layer").otherwise("other_layer"),
        tuned=pl.when(pl.col("side") == "base").then("other_layer").otherwise("layer"),
    )
    assert len(rows) == 9
    best = rows.sort(-pl.col("jaccard"), "tuned").unique("base", keep="first", maintain_order=True)
    expected = (best["base"] == best["tuned"]).mean()
    assert METHOD.headline(tables)["layers_matched"] == pytest.approx(expected)
    assert "layers_matched" not in METHOD.headline(planted.tables(tmp_path, layers=(0,)))


def test_the_null_is_empty_by_construction_once_the_base_saturated(tables: Tables) -> None:
    """So that p is that of the texts with new atoms alone: 2^(1 − k)."""
    layers = frame(tables, "layers")
    assert layers["is_saturated"].all() and layers["null_atoms"].sum() == 0
    np.testing.assert_allclose(layers["p_value"], 2.0 ** (1 - layers["tuned_documents"].to_numpy()))


def test_layers_are_compared_on_the_tokens_that_all_of_them_have() -> None:
    """Each layer has left out other tokens."""
    draw = torch.Generator().manual_seed(0)
    whole_ND = torch.randn(40, 6, generator=draw)
    kept = [np.delete(np.arange(40), leaves_out) for leaves_out in ([3], [7, 9], [])]
    layers = [
        Compared(layer, dict.fromkeys(("base", "tuned", "base_reordered"), place_N), place_N * 5, dict.fromkeys(("base", "tuned"), whole_ND[place_N]))
        for layer, place_N in enumerate(kept)
    ]
    rows = [row for row in similarity_rows(layers) if row["linear_cka"] is not None]
    assert [row["linear_cka"] for row in rows] == pytest.approx([1.0] * 21)
