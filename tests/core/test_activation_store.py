"""Activation Parquet: every bit survives, a part is there whole or not at all, and a set belongs to one state."""

import os
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from diffing_core import activation_parts
from diffing_core.activation_parts import ROWS_PER_GROUP, checksum, complete_parts
from diffing_core.activation_writer import ActivationWriter
from diffing_core.activations import ActivationBlock, ActivationSet, ActivationStore
from diffing_core.blocks import TokenBlock
from diffing_core.errors import StorageError

WIDTH = 4
CONTENT, CORPUS = "a1b2c3", "0123456789ab"


def cut(monkeypatch: pytest.MonkeyPatch, rows_per_group: int = 10, rows_per_part: int = 20) -> None:
    monkeypatch.setattr(activation_parts, "ROWS_PER_GROUP", rows_per_group)
    monkeypatch.setattr(activation_parts, "ROWS_PER_PART", rows_per_part)


def block(n: int, start: int = 0) -> TokenBlock:
    """Facts of N tokens; the sides play no part."""
    index_N = np.arange(start, start + n)
    token_N = torch.from_numpy(index_N + 1000)
    return TokenBlock(
        token_N, token_N, index_N // 5, index_N % 5, (index_N % 5).astype(np.int8), index_N % 2 == 1, None, None
    )


def written(path: Path, *vectors: torch.Tensor) -> list[ActivationBlock]:
    """Writes blocks and reads the set."""
    writer = ActivationWriter(path, vectors[0].shape[1], vectors[0].dtype, sum(map(len, vectors)))
    start = 0
    for vector_ND in vectors:
        writer.add(block(len(vector_ND), start), vector_ND)
        start += len(vector_ND)
    writer.close()
    return list(ActivationSet(path).blocks())


def every_16_bits(dtype: torch.dtype) -> torch.Tensor:
    """All 65,536 values of a 16-bit format: NaNs with payload, infinities, −0.0, subnormals and all others."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(-1, WIDTH)


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # moments of signalling NaNs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_value_of_a_16_bit_format_survives_bit_by_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    vector_ND = every_16_bits(dtype)
    back = torch.cat([each.vector_ND for each in written(tmp_path / "a", vector_ND)])
    assert back.dtype == dtype
    assert torch.equal(back.view(torch.int16), vector_ND.view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_values_beyond_float16_and_below_it_survive(tmp_path: Path, dtype: torch.dtype) -> None:
    """The toolkit's float16 stores turned large residuals into infinities."""
    vector_ND = torch.tensor([[3e38, -1e5, 1e-38, -0.0]], dtype=dtype)
    [back] = written(tmp_path / "a", vector_ND)
    assert back.vector_ND.isfinite().all()
    assert torch.equal(back.vector_ND.view(torch.uint8), vector_ND.view(torch.uint8))


def test_a_vector_takes_two_bytes_a_value(tmp_path: Path) -> None:
    vector_ND = torch.randn(4096, 64).bfloat16()
    written(tmp_path / "a", vector_ND)
    assert ActivationSet(tmp_path / "a").n_bytes < 1.25 * 2 * vector_ND.numel()


def test_facts_of_every_token_come_back_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch)
    vector_ND = torch.randn(37, WIDTH)
    blocks = written(tmp_path / "a", *vector_ND.split([7, 1, 12, 17]))
    assert [len(each.token_N) for each in blocks] == [10, 10, 10, 7], "groups of all files begin at the same rows"
    facts = block(37)
    for name in ("sequence_N", "position_N", "role_N", "template_N", "token_N"):
        expected = np.asarray(getattr(facts, name))
        assert (np.concatenate([getattr(each, name) for each in blocks]) == expected).all(), name
    assert torch.equal(torch.cat([each.vector_ND for each in blocks]), vector_ND)


def test_rows_cut_out_of_a_larger_tensor_are_written_as_they_are(tmp_path: Path) -> None:
    whole_ND = torch.randn(20, 2 * WIDTH)
    [back] = written(tmp_path / "a", whole_ND[3:9:2, WIDTH:])
    assert torch.equal(back.vector_ND, whole_ND[3:9:2, WIDTH:])


def test_toolkit_defect_a_shard_is_held_in_lists_until_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """82 GB there for one shard; here the room of one row group, whatever has been added."""
    cut(monkeypatch, 10, 100)
    writer = ActivationWriter(tmp_path, 1000, torch.float32, 95)
    tracemalloc.start()
    for start in range(0, 90, 5):
        writer.add(block(5, start), torch.zeros(5, 1000))
    held = sum(trace.size for trace in tracemalloc.take_snapshot().traces)
    tracemalloc.stop()
    assert writer._group._vector_GD.nbytes == 10 * 1000 * 4
    assert held < 60_000, "more than another row group and a half"
    writer.add(block(5, 90), torch.zeros(5, 1000))
    writer.close()


def test_vectors_of_another_format_than_declared_are_refused(tmp_path: Path) -> None:
    writer = ActivationWriter(tmp_path / "a", WIDTH, torch.bfloat16, 2)
    with pytest.raises(StorageError, match=r"holds torch.bfloat16, but a block came as torch.float32"):
        writer.add(block(2), torch.zeros(2, WIDTH))
    writer.abandon()


def test_a_part_is_invisible_until_it_is_full_and_a_set_until_all_parts_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch)
    folder = tmp_path / "deep" / "a"
    writer = ActivationWriter(folder, WIDTH, torch.float32, 37)
    for start, n, parts in ((0, 19, []), (19, 1, ["00000-of-00002.parquet"]), (20, 16, ["00000-of-00002.parquet"])):
        writer.add(block(n, start), torch.zeros(n, WIDTH))
        assert [file.name for file in folder.glob("[!.]*")] == parts
        assert complete_parts(folder) == []
    with pytest.raises(StorageError, match="is for 37 rows, but 36 came"):
        writer.close()
    writer.add(block(1, 36), torch.zeros(1, WIDTH))
    writer.close()
    assert [file.name for file in sorted(folder.iterdir())] == ["00000-of-00002.parquet", "00001-of-00002.parquet"]
    assert len(complete_parts(folder)) == 2


def test_more_rows_than_the_corpus_has_are_refused(tmp_path: Path) -> None:
    writer = ActivationWriter(tmp_path / "a", WIDTH, torch.float32, 5)
    with pytest.raises(StorageError, match="is for 5 rows, but 6 came"):
        writer.add(block(6), torch.zeros(6, WIDTH))


def test_an_abandoned_part_leaves_no_trace_and_a_full_one_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch)
    writer = ActivationWriter(tmp_path / "a", WIDTH, torch.float32, 37)
    writer.add(block(33), torch.zeros(33, WIDTH))
    for _ in range(2):
        writer.abandon()
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["00000-of-00002.parquet"]


def test_two_writers_of_one_set_in_one_process_do_not_mix(tmp_path: Path) -> None:
    """A pass that died may leave its writer open while the next one writes the same set."""
    path = tmp_path / "a"
    vector_ND = torch.randn(50, WIDTH)
    dead, alive = (ActivationWriter(path, WIDTH, torch.float32, 50) for _ in range(2))
    dead.add(block(7), torch.zeros(7, WIDTH))
    alive.add(block(50), vector_ND)
    alive.close()
    del dead
    assert torch.equal(next(ActivationSet(path).blocks()).vector_ND, vector_ND)


def test_the_next_writer_goes_on_after_the_parts_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch)
    vector_ND = torch.randn(93, WIDTH)
    written(tmp_path / "whole", vector_ND)
    store = ActivationStore(tmp_path)
    path = store.folder(CONTENT, CORPUS, 1, torch.float32)
    with store:
        store.claim(path, WIDTH, torch.float32, 93).add(block(55), vector_ND[:55])
    kept = {file.name: file.stat().st_ino for file in path.iterdir()}
    assert sorted(kept) == ["00000-of-00005.parquet", "00001-of-00005.parquet"]
    again = ActivationStore(tmp_path)
    first, second = (again.claim(path, WIDTH, torch.float32, 93) for _ in range(2))
    assert first.stored_rows == second.stored_rows == 40
    first.skip(35)
    for start, stop in ((35, 38), (38, 57), (57, 93)):  # known, across the border, new
        first.add(block(stop - start, start), vector_ND[start:stop])
    second.add(block(93), vector_ND)
    first.close(), second.close()
    assert kept.items() <= {file.name: file.stat().st_ino for file in path.iterdir()}.items()
    for part in complete_parts(path):
        assert part.read_bytes() == (tmp_path / "whole" / part.name).read_bytes()


def test_what_a_killed_process_left_is_removed_and_what_another_writes_is_not(tmp_path: Path) -> None:
    alive = ActivationWriter(tmp_path / "a", WIDTH, torch.float32, 2 * ROWS_PER_GROUP)
    alive.add(block(ROWS_PER_GROUP), torch.zeros(ROWS_PER_GROUP, WIDTH))
    [being_written] = (tmp_path / "a").iterdir()
    dead, young = (tmp_path / "a" / f".00000-of-00001.parquet.{name}" for name in ("dead", "young"))
    for file in (dead, young):
        file.write_bytes(b"half")
    for file in (dead, being_written):
        os.utime(file, (time.time() - 1000,) * 2)
    ActivationStore(tmp_path).claim(tmp_path / "a", WIDTH, torch.float32, 2 * ROWS_PER_GROUP)
    assert set((tmp_path / "a").iterdir()) == {being_written, young}


def test_a_set_of_many_parts_is_read_with_few_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, 2, 2)
    vector_ND = torch.randn(200, WIDTH)
    written(tmp_path / "a", vector_ND)
    before = len(os.listdir("/proc/self/fd"))
    whole = ActivationSet(tmp_path / "a")
    kept = list(whole.blocks())
    assert len(kept) == 100
    assert len(os.listdir("/proc/self/fd")) - before < 10
    assert torch.equal(torch.cat([each.vector_ND for each in kept]), vector_ND)


def test_pairs_that_share_a_set_write_every_block_once_whoever_fails(tmp_path: Path) -> None:
    store = ActivationStore(tmp_path)
    path = store.folder(CONTENT, CORPUS, 1, torch.float32)
    failing, going = (store.claim(path, WIDTH, torch.float32, 8) for _ in range(2))
    vector_ND = torch.randn(8, WIDTH)
    for writer in (failing, going):
        writer.add(block(3), vector_ND[:3])
    going.add(block(5), vector_ND[3:])
    going.close()
    failing.close()
    assert torch.equal(next(ActivationSet(path).blocks()).vector_ND, vector_ND)
    assert ActivationStore(tmp_path).claim(path, WIDTH, torch.float32, 8) is None


@pytest.mark.parametrize("fails", ["write_table", "close"])
def test_a_set_that_could_not_be_written_is_finished_by_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    def disk_full(*_: object, **__: object) -> None:
        raise OSError("disk full")

    store = ActivationStore(tmp_path)
    path = store.folder(CONTENT, CORPUS, 1, torch.float32)
    first, second = (store.claim(path, WIDTH, torch.float32, 3) for _ in range(2))
    with monkeypatch.context() as patch:
        patch.setattr(pq.ParquetWriter, fails, disk_full)
        with pytest.raises(OSError, match="disk full"):
            first.add(block(3), torch.zeros(3, WIDTH))
    second.add(block(3), torch.zeros(3, WIDTH))
    with pytest.raises(StorageError, match="another pair of this pass"):
        second.close()
    assert complete_parts(path) == []


def test_moments_of_a_set_are_those_of_its_rows_in_float64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch)
    vector_ND = (1e4 + torch.randn(93, WIDTH)).bfloat16()
    written(tmp_path / "a", *vector_ND.split([7, 41, 45]))
    moments = ActivationSet(tmp_path / "a").moments()
    exact_ND = vector_ND.double().numpy()
    assert moments.count == 93
    np.testing.assert_allclose(moments.mean_D, exact_ND.mean(0), rtol=1e-14)
    np.testing.assert_allclose(moments.variance_D(), exact_ND.var(0), rtol=1e-12)


@pytest.mark.parametrize(
    "other",
    [("a1b2c3+d4", CORPUS, 1, torch.float32), (CONTENT, "ba9876543210", 1, torch.float32),
     (CONTENT, CORPUS, 11, torch.float32), (CONTENT, CORPUS, 1, torch.bfloat16)],
)  # fmt: skip
def test_another_state_corpus_layer_or_number_format_is_another_file(tmp_path: Path, other: tuple) -> None:
    """The toolkit's key was the last part of the model's name, so adapters in one repository shared a cache."""
    store = ActivationStore(tmp_path)
    assert store.folder(*other) != store.folder(CONTENT, CORPUS, 1, torch.float32)


def test_a_revision_never_leads_out_of_the_store(tmp_path: Path) -> None:
    path = ActivationStore(tmp_path).folder("../../owner/name@main", CORPUS, 1, torch.float32)
    assert path.parent.parent.parent == tmp_path
    assert path.resolve().is_relative_to(tmp_path)


def test_another_parquet_file_is_refused_by_name(tmp_path: Path) -> None:
    pq.write_table(pa.table({"vector": [b"abcd"]}), tmp_path / "00000-of-00001.parquet")
    with pytest.raises(StorageError, match=r"00000-of-00001.parquet is no part of stored activations"):
        ActivationSet(tmp_path)


def test_a_set_of_which_a_part_is_missing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch)
    written(tmp_path / "a", torch.randn(37, WIDTH))
    (tmp_path / "a" / "00000-of-00002.parquet").unlink()
    with pytest.raises(StorageError, match="a holds no complete set of activations; materialize `activations` again"):
        ActivationSet(tmp_path / "a")


def test_rows_are_read_by_number_across_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch)
    vector_ND = torch.randn(37, WIDTH).bfloat16()
    written(tmp_path / "a", vector_ND)
    whole = ActivationSet(tmp_path / "a")
    assert (whole.n_rows, whole.d_model, whole.dtype) == (37, WIDTH, "bfloat16")
    for start, stop in ((0, 37), (0, 10), (10, 20), (9, 11), (13, 14), (5, 31), (30, 37), (36, 37)):
        rows = whole.rows(start, stop)
        assert torch.equal(rows.vector_ND, vector_ND[start:stop])
        assert rows.token_N.tolist() == [1000 + index for index in range(start, stop)]


@pytest.mark.parametrize("place", ["vector", "last vector", "token"])
def test_a_changed_byte_is_noticed(tmp_path: Path, place: str) -> None:
    vector_ND = torch.randn(500, 65)
    written(tmp_path / "a", vector_ND)
    [part] = complete_parts(tmp_path / "a")
    raw = bytearray(part.read_bytes())
    known = {
        "vector": vector_ND[250].numpy().tobytes(),
        "last vector": vector_ND[-1].numpy().tobytes(),
        "token": np.arange(1200, 1300, dtype=np.int32).tobytes(),
    }
    raw[raw.index(known[place]) + 5] ^= 1
    part.write_bytes(raw)
    damaged = ActivationSet(tmp_path / "a")
    for _ in range(2):
        with pytest.raises(StorageError, match=r"00000-of-00001.parquet is damaged in row group 0 \(checksum .*\); delete it"):
            damaged.rows(0, 10)


@pytest.mark.parametrize("damage", ["zeroed", "rows exchanged", "shifted by a row"])
def test_pages_that_a_disk_lost_or_mixed_up_are_noticed(damage: str) -> None:
    vector_ND = torch.randn(300, 1024)
    other_ND = vector_ND.clone()
    if damage == "zeroed":
        other_ND[100:104] = 0
    elif damage == "rows exchanged":
        other_ND[[3, 200]] = other_ND[[200, 3]]
    else:
        other_ND[1:] = vector_ND[:-1]
    sums = set()
    for each in (vector_ND, other_ND):
        values = pa.FixedSizeBinaryArray.from_buffers(pa.binary(4096), 300, [None, pa.py_buffer(each.numpy().tobytes())])
        sums.add(checksum(pa.table({"token_id": pa.array(range(300)), "vector": values})))
    assert len(sums) == 2


def test_a_part_that_was_cut_off_is_refused_and_written_again_once_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch)
    vector_ND = torch.randn(50, WIDTH)
    written(tmp_path / "a", vector_ND)
    part = complete_parts(tmp_path / "a")[1]
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(StorageError, match=r"00001-of-00003.parquet cannot be read .*; delete it and materialize `activations` again"):
        ActivationSet(tmp_path / "a")
    part.unlink()
    writer = ActivationWriter(tmp_path / "a", WIDTH, torch.float32, 50)
    assert writer.n_rows == 20
    writer.add(block(30, 20), vector_ND[20:])
    writer.close()
    assert torch.equal(ActivationSet(tmp_path / "a").rows(0, 50).vector_ND, vector_ND)
