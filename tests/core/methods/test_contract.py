"""Promises that every method keeps, parametrised over the registry: a new method is covered unasked."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch

from diffing_core.activation_pairs import StoredPair
from diffing_core.activations import ActivationStore
from diffing_core.comparison import timed_run
from diffing_core.corpus import ProbeCorpus, ProbeSequence
from diffing_core.errors import UndeclaredNeedError
from diffing_core.findings import findings_table
from diffing_core.methods import all_methods, get_method
from diffing_core.methods.base import Inputs, Method, Need
from diffing_core.models import ModelPair, Subject
from diffing_core.paired_pass import MethodResult, paired_pass
from diffing_core.pairs import Pair
from diffing_core.peers import Peer, Peers
from diffing_core.settings import Settings
from diffing_core.weights import WeightPair
from tests import model_files

METHODS = list(all_methods().values())
STREAMS = [method for method in METHODS if method.kind == "stream"]
PLANTED = 7
BOOST = 6.0


def corpus(lengths: tuple[int, ...] = (12, 9, 5, 12, 7, 3), seed: int = 0) -> ProbeCorpus:
    """Random tokens in sequences of different length, so that padding matters."""
    draw = np.random.default_rng(seed)
    sequences = [
        ProbeSequence(draw.integers(2, model_files.VOCAB, n).astype(np.int32), np.zeros(n, np.int8), np.zeros(n, bool))
        for n in lengths
    ]
    for sequence in sequences:
        sequence.token_T[2] = PLANTED
    return ProbeCorpus("probe", tuple(sequences), len(sequences))


class Planted:
    """Checkpoints on disk and in memory: a base, and a copy that says one token far too often."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = model_files.tokenizer()
        self.base_folder = model_files.save_base(folder / "base", tie_word_embeddings=False)
        self.tuned_folder = folder / "tuned"
        base, tuned = (model_files.build(tie_word_embeddings=False) for _ in range(2))
        with torch.no_grad():
            base.lm_head.weight[PLANTED] *= 3
        base.save_pretrained(self.base_folder)
        plant(tuned)
        tuned.save_pretrained(self.tuned_folder)
        self.tokenizer.save_pretrained(self.tuned_folder)
        self.peer_folder = model_files.save_adapter(folder / "peer", self.base_folder, target_modules=["down_proj"])
        self.base = Subject.of(base, revision="base")
        self.tuned = Subject.of(tuned, revision="tuned")

    def run(
        self, method: Method, base: str, tuned: str, probe: ProbeCorpus, store: Path, *, settings: Settings | None = None, **options
    ) -> MethodResult:
        """One method on two of the sides."""
        settings = settings or method.settings()
        sides = {name: getattr(self, name).local() for name in (base, tuned)}  # as newly loaded: nothing written yet
        pair = ModelPair(sides[base], sides[tuned], self.tokenizer, Pair("m", "o"), model_files.VOCAB)
        if method.kind == "stream":
            [result] = paired_pass([pair], probe, [(method, settings)], store=store, **options)
        else:
            weights = WeightPair.of_folders(getattr(self, f"{base}_folder"), getattr(self, f"{tuned}_folder"))
            other = WeightPair.of_folders(self.base_folder, self.peer_folder)
            peers = Peers(weights, (Peer(Pair("m", "another"), "other", "hash", other),))
            suppliers = {
                Need.MODELS: lambda: pair,
                Need.WEIGHTS: lambda: weights,
                Need.PEERS: lambda: peers,
                Need.ACTIVATIONS: lambda: stored_activations(pair, probe, store),
                Need.FOLDER: lambda: Path(tempfile.mkdtemp(dir=store)),
            }
            result = timed_run(pair, method, settings, Inputs(method, suppliers))
        assert result.error is None, result.error
        return result


def stored_activations(pair: ModelPair, probe: ProbeCorpus, store: Path) -> StoredPair:
    """Every layer's activations on disk."""
    method = get_method("activations")
    [written] = paired_pass([pair], probe, [(method, method.settings(layers=None))], store=store)
    assert written.error is None, written.error
    sides = ((side.revision, side.dtype) for side in (pair.base, pair.tuned))
    return StoredPair(ActivationStore(store), *sides, (probe,))


def plant(model: Any) -> None:
    """Moves the whole residual stream toward one token, most at that token itself, and one write matrix too."""
    with torch.no_grad():
        head_VD = model.lm_head.weight
        head_VD[PLANTED] *= 3
        direction_D = torch.nn.functional.normalize(head_VD[PLANTED], dim=0)
        embedding_VD = model.model.embed_tokens.weight
        embedding_VD += BOOST * direction_D
        embedding_VD[PLANTED] += 4 * BOOST * direction_D
        down_DF = model.model.layers[-1].mlp.down_proj.weight
        down_DF += BOOST * torch.outer(direction_D, torch.ones(down_DF.shape[1]) / down_DF.shape[1] ** 0.5)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return Planted(tmp_path_factory.mktemp("planted"))


def effects(result: MethodResult) -> dict[str, np.ndarray]:
    """Values of every effect column by table and column, list columns flattened."""
    found = {}
    for spec in result.method.tables:
        for column in spec.columns:
            if column.role == "effect":
                values = result.tables[spec.name][column.name].combine_chunks()
                if pa.types.is_list(values.type):
                    values = values.flatten()
                found[f"{spec.name}.{column.name}"] = values.drop_null().to_numpy(zero_copy_only=False).astype(float)
    return found


def shown(result: MethodResult) -> list:
    return [] if result.method.findings is None else list(result.method.findings(result.tables, result.settings))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_identical_models_show_no_effect_and_no_finding(method: Method, planted: Planted, tmp_path: Path) -> None:
    result = planted.run(method, "base", "base", corpus(), tmp_path)
    for name, values in effects(result).items():
        assert not values.any(), f"{name} is not zero for identical models"
    assert shown(result) == []


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_planted_token_is_the_first_one_shown(method: Method, planted: Planted, tmp_path: Path) -> None:
    result = planted.run(method, "base", "tuned", corpus(), tmp_path)
    if method.findings is None:
        assert all(table.num_rows for table in result.tables.values())
        return
    tokens = [finding for finding in shown(result) if finding.kind == "token"]
    assert tokens[0].item.strip() == f"w{PLANTED}"
    assert tokens[0].score > 0


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_findings_resolve_to_rows_of_the_typed_tables(method: Method, planted: Planted, tmp_path: Path) -> None:
    result = planted.run(method, "base", "tuned", corpus(), tmp_path)
    frames = {name: pl.from_arrow(table) for name, table in result.tables.items()}
    for finding in shown(result):
        matches = frames[finding.source_table].filter(
            [pl.col(name).eq_missing(pl.lit(value)) for name, value in finding.source_key.items()]
        )
        assert len(matches) == 1, f"{finding} resolves to {len(matches)} rows"
    findings_table(shown(result))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_swapping_the_pair_flips_signed_effects(method: Method, planted: Planted, tmp_path: Path) -> None:
    forth = planted.run(method, "base", "tuned", corpus(), tmp_path / "forth")
    back = planted.run(method, "tuned", "base", corpus(), tmp_path / "back")
    for spec in method.tables:
        signed = [column.name for column in spec.columns if column.signed]
        keys = list(spec.grain)
        if not signed or "rank" in keys:
            continue
        both = pl.from_arrow(forth.tables[spec.name]).join(
            pl.from_arrow(back.tables[spec.name]), on=keys, suffix="_back", nulls_equal=True
        )
        assert len(both), f"{spec.name}: no row in common"
        for name in signed:
            there, again = (np.asarray(both[column].explode().drop_nulls(), float) for column in (name, f"{name}_back"))
            assert np.abs(there).max() > 0, f"{spec.name}.{name} shows nothing of the planted difference"
            np.testing.assert_allclose(there, -again, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", STREAMS, ids=lambda method: method.name)
def test_results_do_not_depend_on_batches_and_padding(method: Method, planted: Planted, tmp_path: Path) -> None:
    alone = planted.run(method, "base", "tuned", corpus(), tmp_path / "alone", tokens_per_batch=1)
    together = planted.run(method, "base", "tuned", corpus(), tmp_path / "together", tokens_per_batch=4096)
    for spec in method.tables:
        assert_close(alone.tables[spec.name], together.tables[spec.name], spec.grain)


@pytest.mark.parametrize("method", STREAMS, ids=lambda method: method.name)
def test_results_do_not_depend_on_the_order_of_documents(method: Method, planted: Planted, tmp_path: Path) -> None:
    """Samples are smaller than the corpus here, so that which tokens belong to them matters."""
    probe = corpus((30, 25, 20) * 10)
    for index, sequence in enumerate(probe.sequences):
        sequence.token_T[0] = PLANTED + 1 + index  # else two texts begin alike, and the first of them is the example
    backwards = replace(probe, sequences=probe.sequences[::-1])
    sizes = {"nmf_positions": 100, "cooccurrence_positions": 100, "sequences": 12}
    settings = method.settings(**{name: size for name, size in sizes.items() if name in method.settings.model_fields})
    one, other = (planted.run(method, "base", "tuned", each, tmp_path, settings=settings) for each in (probe, backwards))
    for spec in method.tables:
        table = other.tables[spec.name]
        if "sequence" in table.column_names:
            place = table.column_names.index("sequence")
            turned = pa.array(len(probe.sequences) - 1 - table["sequence"].to_numpy(), type=table.schema.field(place).type)
            table = table.set_column(place, table.schema.field(place), turned)
        assert_close(one.tables[spec.name], table, spec.grain)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_two_runs_are_equal(method: Method, planted: Planted, tmp_path: Path) -> None:
    first = planted.run(method, "base", "tuned", corpus(), tmp_path / "a")
    second = planted.run(method, "base", "tuned", corpus(), tmp_path / "b")
    for name, table in first.tables.items():
        assert table.equals(second.tables[name]), name
    assert shown(first) == shown(second)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_tables_are_exactly_those_declared_and_pass_their_check(method: Method, planted: Planted, tmp_path: Path) -> None:
    result = planted.run(method, "base", "tuned", corpus(), tmp_path)
    assert set(result.tables) == {spec.name for spec in method.tables}
    for spec in method.tables:
        spec.check(result.tables[spec.name])
    assert all(isinstance(value, int | float | str) for value in method.headline(result.tables).values())


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_setting_changes_the_identity(method: Method) -> None:
    default = method.settings()
    for name in method.settings.model_fields:
        changed = default.model_copy(update={name: "something else"})
        assert changed.settings_id() != default.settings_id(), name


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_only_declared_inputs_can_be_read(method: Method) -> None:
    inputs = Inputs(method, {need: lambda: "given" for need in Need})
    for need in Need:
        if need in method.needs:
            assert inputs[need] == "given"
        else:
            with pytest.raises(UndeclaredNeedError, match=need.value):
                inputs[need]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_effect_columns_and_docs_are_complete(method: Method) -> None:
    for spec in method.tables:
        assert spec.doc.endswith("."), spec.name
        assert all(column.doc for column in spec.columns), spec.name


def assert_close(left: pa.Table, right: pa.Table, grain: tuple[str, ...]) -> None:
    """Equal keys; numbers equal to 1e-5; bytes on disk and file names left out."""
    one, two = (pl.from_arrow(table).sort(grain, nulls_last=True) for table in (left, right))
    assert one.select(grain).equals(two.select(grain))
    for values, other in zip(one, two, strict=True):
        if values.dtype.is_nested():
            values, other = values.explode(), other.explode()
        if values.dtype.is_float():
            np.testing.assert_allclose(values.to_numpy(), other.to_numpy(), atol=1e-5, rtol=1e-4, err_msg=values.name)
        elif values.name not in ("n_bytes", "folder"):
            assert values.equals(other), values.name
