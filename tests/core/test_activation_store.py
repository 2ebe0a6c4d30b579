"""Activation Parquet: every bit survives, a file is there whole or not at all, and belongs to one state."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from diffing_core import activations
from diffing_core.activations import (
    ROWS_PER_GROUP,
    ActivationBlock,
    ActivationFile,
    ActivationStore,
    ActivationWriter,
    read_activations,
)
from diffing_core.blocks import TokenBlock
from diffing_core.errors import StorageError

WIDTH = 4
CONTENT, CORPUS = "a1b2c3", "0123456789ab"


def block(n: int, start: int = 0) -> TokenBlock:
    """Facts of N tokens; the sides play no part."""
    index_N = np.arange(start, start + n)
    token_N = torch.from_numpy(index_N + 1000)
    return TokenBlock(
        token_N, token_N, index_N // 5, index_N % 5, (index_N % 5).astype(np.int8), index_N % 2 == 1, None, None
    )


def written(path: Path, *vectors: torch.Tensor) -> list[ActivationBlock]:
    """Writes blocks and reads the file."""
    writer = ActivationWriter(path, vectors[0].shape[1], vectors[0].dtype)
    start = 0
    for vector_ND in vectors:
        writer.add(block(len(vector_ND), start), vector_ND)
        start += len(vector_ND)
    writer.close()
    return list(read_activations(path))


def every_16_bits(dtype: torch.dtype) -> torch.Tensor:
    """All 65,536 values of a 16-bit format: NaNs with payload, infinities, −0.0, subnormals and all others."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(-1, WIDTH)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_value_of_a_16_bit_format_survives_bit_by_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    vector_ND = every_16_bits(dtype)
    back = torch.cat([each.vector_ND for each in written(tmp_path / "a.parquet", vector_ND)])
    assert back.dtype == dtype
    assert torch.equal(back.view(torch.int16), vector_ND.view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_values_beyond_float16_and_below_it_survive(tmp_path: Path, dtype: torch.dtype) -> None:
    """The toolkit's float16 stores turned large residuals into infinities."""
    vector_ND = torch.tensor([[3e38, -1e5, 1e-38, -0.0]], dtype=dtype)
    [back] = written(tmp_path / "a.parquet", vector_ND)
    assert back.vector_ND.isfinite().all()
    assert torch.equal(back.vector_ND.view(torch.uint8), vector_ND.view(torch.uint8))


def test_a_vector_takes_two_bytes_a_value(tmp_path: Path) -> None:
    vector_ND = torch.randn(4096, 64).bfloat16()
    written(tmp_path / "a.parquet", vector_ND)
    assert (tmp_path / "a.parquet").stat().st_size < 1.25 * 2 * vector_ND.numel()


def test_facts_of_every_token_come_back_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "ROWS_PER_GROUP", 10)
    vector_ND = torch.randn(37, WIDTH)
    blocks = written(tmp_path / "a.parquet", *vector_ND.split([7, 1, 12, 17]))
    assert [len(each.token_N) for each in blocks] == [10, 10, 10, 7], "groups of all files begin at the same rows"
    facts = block(37)
    for name in ("sequence_N", "position_N", "role_N", "template_N", "token_N"):
        expected = np.asarray(getattr(facts, name))
        assert (np.concatenate([getattr(each, name) for each in blocks]) == expected).all(), name
    assert torch.equal(torch.cat([each.vector_ND for each in blocks]), vector_ND)


def test_rows_cut_out_of_a_larger_tensor_are_written_as_they_are(tmp_path: Path) -> None:
    whole_ND = torch.randn(20, 2 * WIDTH)
    [back] = written(tmp_path / "a.parquet", whole_ND[3:9:2, WIDTH:])
    assert torch.equal(back.vector_ND, whole_ND[3:9:2, WIDTH:])


def test_vectors_of_another_format_than_declared_are_refused(tmp_path: Path) -> None:
    writer = ActivationWriter(tmp_path / "a.parquet", WIDTH, torch.bfloat16)
    with pytest.raises(StorageError, match=r"holds torch.bfloat16, but a block came as torch.float32"):
        writer.add(block(2), torch.zeros(2, WIDTH))
    writer.abandon()


def test_a_file_is_invisible_until_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.parquet"
    writer = ActivationWriter(path, WIDTH, torch.float32)
    writer.add(block(3), torch.zeros(3, WIDTH))
    assert list(path.parent.glob("[!.]*")) == []
    writer.close()
    assert [file.name for file in path.parent.iterdir()] == ["a.parquet"]


def test_an_abandoned_file_leaves_no_trace_and_a_closed_one_stays(tmp_path: Path) -> None:
    first, second = (ActivationWriter(tmp_path / name, WIDTH, torch.float32) for name in ("a.parquet", "b.parquet"))
    for writer in (first, second):
        writer.add(block(3), torch.zeros(3, WIDTH))
    first.close()
    for writer in (first, second, second):
        writer.abandon()
    assert [file.name for file in tmp_path.iterdir()] == ["a.parquet"]


def test_two_writers_of_one_file_in_one_process_do_not_mix(tmp_path: Path) -> None:
    """A pass that died may leave its writer open while the next one writes the same file."""
    path = tmp_path / "a.parquet"
    vector_ND = torch.randn(50, WIDTH)
    dead, alive = (ActivationWriter(path, WIDTH, torch.float32) for _ in range(2))
    dead.add(block(7), torch.zeros(7, WIDTH))
    alive.add(block(50), vector_ND)
    alive.close()
    del dead
    assert torch.equal(next(read_activations(path)).vector_ND, vector_ND)


def test_pairs_that_share_a_file_write_every_block_once_whoever_fails(tmp_path: Path) -> None:
    store = ActivationStore(tmp_path)
    path = store.file(CONTENT, CORPUS, 1, torch.float32)
    failing, going = (store.claim(path, WIDTH, torch.float32) for _ in range(2))
    vector_ND = torch.randn(8, WIDTH)
    for writer in (failing, going):
        writer.add(block(3), vector_ND[:3])
    going.add(block(5), vector_ND[3:])
    going.close()
    failing.close()
    assert torch.equal(next(read_activations(path)).vector_ND, vector_ND)
    assert ActivationStore(tmp_path).claim(path, WIDTH, torch.float32) is None


def test_a_file_that_could_not_be_written_is_finished_by_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk_full(*_: object, **__: object) -> None:
        raise OSError("disk full")

    store = ActivationStore(tmp_path)
    path = store.file(CONTENT, CORPUS, 1, torch.float32)
    first, second = (store.claim(path, WIDTH, torch.float32) for _ in range(2))
    with monkeypatch.context() as patch:
        patch.setattr(pq.ParquetWriter, "write_table", disk_full)
        with pytest.raises(OSError, match="disk full"):
            first.add(block(ROWS_PER_GROUP), torch.zeros(ROWS_PER_GROUP, WIDTH))
    second.add(block(ROWS_PER_GROUP), torch.zeros(ROWS_PER_GROUP, WIDTH))
    with pytest.raises(StorageError, match="another pair of this pass"):
        second.close()
    assert not path.exists()


def test_a_file_whose_end_could_not_be_written_is_published_by_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ActivationStore(tmp_path)
    path = store.file(CONTENT, CORPUS, 1, torch.float32)
    first, second = (store.claim(path, WIDTH, torch.float32) for _ in range(2))
    for writer in (first, second):
        writer.add(block(3), torch.zeros(3, WIDTH))

    def disk_full(_writer: pq.ParquetWriter) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(pq.ParquetWriter, "close", disk_full)
        with pytest.raises(OSError, match="disk full"):
            first.close()
    with pytest.raises(StorageError, match="another pair of this pass"):
        second.close()
    assert not path.exists()


def test_an_unfinished_file_can_be_claimed_by_the_next_pass(tmp_path: Path) -> None:
    with ActivationStore(tmp_path) as store:
        path = store.file(CONTENT, CORPUS, 1, torch.float32)
        store.claim(path, WIDTH, torch.float32).add(block(3), torch.zeros(3, WIDTH))
    assert list(path.parent.iterdir()) == []
    assert ActivationStore(tmp_path).claim(path, WIDTH, torch.float32) is not None


@pytest.mark.parametrize(
    "other",
    [("a1b2c3+d4", CORPUS, 1, torch.float32), (CONTENT, "ba9876543210", 1, torch.float32),
     (CONTENT, CORPUS, 11, torch.float32), (CONTENT, CORPUS, 1, torch.bfloat16)],
)  # fmt: skip
def test_another_state_corpus_layer_or_number_format_is_another_file(tmp_path: Path, other: tuple) -> None:
    """The toolkit's key was the last part of the model's name, so adapters in one repository shared a cache."""
    store = ActivationStore(tmp_path)
    assert store.file(*other) != store.file(CONTENT, CORPUS, 1, torch.float32)


def test_a_revision_never_leads_out_of_the_store(tmp_path: Path) -> None:
    path = ActivationStore(tmp_path).file("../../owner/name@main", CORPUS, 1, torch.float32)
    assert path.parent.parent.parent == tmp_path
    assert path.resolve().is_relative_to(tmp_path)


def test_another_parquet_file_is_refused_by_name(tmp_path: Path) -> None:
    pq.write_table(pa.table({"vector": [b"abcd"]}), tmp_path / "other.parquet")
    with pytest.raises(StorageError, match=r"other.parquet is not an activation file"):
        list(read_activations(tmp_path / "other.parquet"))


def test_rows_are_read_by_number_across_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "ROWS_PER_GROUP", 10)
    vector_ND = torch.randn(37, WIDTH).bfloat16()
    written(tmp_path / "a.parquet", vector_ND)
    file = ActivationFile(tmp_path / "a.parquet")
    assert (file.n_rows, file.d_model, file.dtype) == (37, WIDTH, "bfloat16")
    for start, stop in ((0, 37), (0, 10), (10, 20), (9, 11), (13, 14), (5, 31), (30, 37), (36, 37)):
        rows = file.rows(start, stop)
        assert torch.equal(rows.vector_ND, vector_ND[start:stop])
        assert rows.token_N.tolist() == [1000 + index for index in range(start, stop)]


def test_a_changed_byte_of_a_vector_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    vector_ND = torch.randn(500, 64)
    written(path, vector_ND)
    raw = bytearray(path.read_bytes())
    raw[raw.index(vector_ND[250].numpy().tobytes()) + 5] ^= 1
    path.write_bytes(raw)
    with pytest.raises(StorageError, match=r"a.parquet is damaged in row group 0 .*CRC.*; delete it"):
        list(read_activations(path))


def test_a_file_that_was_cut_off_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    written(path, torch.randn(50, WIDTH))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(StorageError, match=r"a.parquet cannot be read .*; delete it and materialize `activations` again"):
        ActivationFile(path)
