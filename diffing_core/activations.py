"""Activation Parquet: residual vectors on disk, one file per model state, corpus and layer.

    <store>/<revision>/<corpus hash>/layer_<i>.<dtype>.parquet

A file belongs to a model state, not to a pair, so the base's activations are written once and shared by
all its organisms. Vectors are fixed-size binary in the model's own dtype: bf16 survives bit by bit at
2 bytes a value, nothing overflows, and reading stays near a raw memory map's rate (list columns were
an order of magnitude slower, `make bench`).
"""

import os
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diffing_core.blocks import TokenBlock
from diffing_core.errors import StorageError
from diffing_core.lazy import torch

ROWS_PER_GROUP = 8192


@dataclass(frozen=True)
class ActivationBlock:
    """Rows of one file: N tokens with their vectors [N, D] in the stored dtype."""

    sequence_N: np.ndarray
    position_N: np.ndarray
    token_N: np.ndarray
    role_N: np.ndarray
    template_N: np.ndarray
    vector_ND: Any


class ActivationStore:
    """The files below one folder, and which of them are being written in this pass.

    Pairs of a cohort share their base, and so its writer: whichever of them comes first with a block writes it,
    and one that fails leaves the file to the others. Two passes may write the same file aside of it; their
    contents are equal, the last rename wins. As a context, it abandons what nobody finished when it ends.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._writers: dict[Path, ActivationWriter] = {}

    def __enter__(self) -> "ActivationStore":
        return self

    def __exit__(self, *_: object) -> None:
        for writer in self._writers.values():
            writer.abandon()

    def file(self, revision: str, corpus_hash: str, layer: int, dtype: Any) -> Path:
        """Where the activations of one model state in one number format, one corpus and layer lie."""
        return self._folder(revision, corpus_hash) / f"layer_{layer}.{name_of(dtype)}.parquet"

    def layers(self, revision: str, corpus_hash: str, dtype: Any) -> set[int]:
        """Layers of which there is a finished file."""
        names = (file.name for file in self._folder(revision, corpus_hash).glob("layer_*.parquet"))
        found = (re.fullmatch(rf"layer_(\d+)\.{name_of(dtype)}\.parquet", name) for name in names)
        return {int(match[1]) for match in found if match}

    def _folder(self, revision: str, corpus_hash: str) -> Path:
        return self.root / re.sub(r"[^A-Za-z0-9.+-]", "_", revision) / corpus_hash

    def claim(self, file: Path, d_model: int, dtype: Any) -> "SharedWriter | None":
        """One pair's hand on the file, unless it is complete."""
        if file not in self._writers:
            if file.exists():
                return None
            self._writers[file] = ActivationWriter(file, d_model, dtype)
        return SharedWriter(self._writers[file])


class SharedWriter:
    """One pair's hand on a file that several pairs write together: all come with the same blocks in the same order."""

    def __init__(self, file: "ActivationWriter") -> None:
        self._file = file
        self._n_rows = 0

    def add(self, block: TokenBlock, vector_ND: Any) -> None:
        """Adds the block's tokens with their vectors, unless another pair did already."""
        if self._n_rows == self._file.n_rows:
            self._file.add(block, vector_ND)
        self._n_rows += len(block)

    def close(self) -> None:
        """Declares the file complete, unless another pair did already."""
        self._file.close()


class ActivationWriter:
    """Writes one file, block by block, beside its place; `close` renames it, `abandon` removes it."""

    def __init__(self, path: Path, d_model: int, dtype: Any) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        self._dtype = dtype
        self._width = d_model * dtype.itemsize
        facts = {"d_model": str(d_model), "dtype": name_of(dtype)}
        self._writer = pq.ParquetWriter(
            self._aside,
            _schema(self._width, facts),
            compression="none",
            use_dictionary=False,
            write_page_checksum=True,
        )
        self._pending: list[pa.RecordBatch] = []
        self._intact, self._finished = True, False
        self.n_rows = 0

    def add(self, block: TokenBlock, vector_ND: Any) -> None:
        """Adds the block's tokens with their vectors."""
        if vector_ND.dtype != self._dtype:
            raise StorageError(f"{self.path} holds {self._dtype}, but a block came as {vector_ND.dtype}: mend the model's dtype")
        raw = vector_ND.contiguous().cpu().view(torch.uint8).numpy()
        vectors = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(self._width), len(block), [None, pa.py_buffer(raw)]
        )
        columns = [block.sequence_N, block.position_N, block.token_N.cpu().numpy(), block.role_N, block.template_N]
        schema = self._writer.schema
        arrays = [pa.array(values, type=field.type) for values, field in zip(columns, schema, strict=False)]
        self._pending.append(pa.RecordBatch.from_arrays([*arrays, vectors], schema=schema))
        self.n_rows += len(block)
        self._flush(ROWS_PER_GROUP)

    def close(self) -> None:
        """Declares the file complete."""
        if self._finished:
            return
        self._flush(1)
        self._intact = False
        self._writer.close()
        os.replace(self._aside, self.path)
        self._finished = True

    def abandon(self) -> None:
        """Leaves no trace of an unfinished file; a finished one stays."""
        self._writer.close()
        self._aside.unlink(missing_ok=True)

    def _flush(self, least: int) -> None:
        """Writes full row groups, and the rest too if `least` rows are enough: groups of all files begin at the same rows."""
        if not self._intact:
            raise StorageError(f"{self.path} could not be written by another pair of this pass; run this pair again")
        n_rows = sum(map(len, self._pending))
        if n_rows < least:
            return
        pending = pa.Table.from_batches(self._pending)
        written = n_rows if least < ROWS_PER_GROUP else n_rows - n_rows % ROWS_PER_GROUP
        self._intact = False
        self._writer.write_table(pending.slice(0, written), row_group_size=ROWS_PER_GROUP)
        self._pending, self._intact = pending.slice(written).to_batches(), True


def name_of(dtype: Any) -> str:
    """A torch dtype without its library: float32, bfloat16, …"""
    return str(dtype).removeprefix("torch.")


class ActivationFile:
    """One finished file, opened; rows are read by number, through a memory map and without a copy.

    Raises:
        StorageError: no such file, cut off, of other bytes than were written, or no activation file.
    """

    def __init__(self, path: Path, *, verify: bool = True) -> None:
        self.path = path
        try:
            self._file = pq.ParquetFile(path, memory_map=True, page_checksum_verification=verify)
        except (pa.ArrowInvalid, OSError) as error:
            raise StorageError(f"{path} cannot be read ({error}); delete it and materialize `activations` again") from error
        facts = {key.decode(): value.decode() for key, value in (self._file.schema_arrow.metadata or {}).items()}
        if "dtype" not in facts:
            raise StorageError(f"{path} is not an activation file: its schema names no dtype; delete and recompute it")
        self.dtype: str = facts["dtype"]
        self.d_model = int(facts["d_model"])
        sizes = [self._file.metadata.row_group(group).num_rows for group in range(self._file.num_row_groups)]
        self._starts = np.cumsum([0, *sizes])

    @property
    def n_rows(self) -> int:
        """Tokens stored."""
        return int(self._starts[-1])

    def rows(self, start: int, stop: int) -> ActivationBlock:
        """Rows start … stop − 1, whatever the row groups."""
        first, last = np.searchsorted(self._starts, (start, max(start, stop - 1)), side="right") - 1
        parts = [self._group(group) for group in range(first, last + 1)]
        offset = int(self._starts[first])
        table = pa.concat_tables(parts).slice(start - offset, stop - start).combine_chunks()
        return _block(table, self.d_model, self.dtype)

    def blocks(self) -> Iterator[ActivationBlock]:
        """All rows, a row group at a time."""
        for group in range(self._file.num_row_groups):
            yield _block(self._group(group).combine_chunks(), self.d_model, self.dtype)

    def _group(self, group: int) -> pa.Table:
        try:
            return self._file.read_row_group(group)
        except (pa.ArrowInvalid, OSError) as error:
            raise StorageError(
                f"{self.path} is damaged in row group {group} ({error}); delete it and materialize `activations` again"
            ) from error


def read_activations(path: Path) -> Iterator[ActivationBlock]:
    """The rows of one file, a row group at a time; memory of one group, no copy of the vectors."""
    yield from ActivationFile(path).blocks()


def _block(table: pa.Table, d_model: int, dtype: str) -> ActivationBlock:
    columns = {name: table[name].chunk(0) for name in table.schema.names}
    kind = getattr(torch, dtype)
    raw, start = columns["vector"].buffers()[1], columns["vector"].offset * d_model * kind.itemsize
    vector_ND = torch.frombuffer(memoryview(raw), dtype=kind, count=len(table) * d_model, offset=start)
    return ActivationBlock(
        columns["sequence"].to_numpy(),
        columns["position"].to_numpy(),
        columns["token_id"].to_numpy(),
        columns["role"].to_numpy(),
        columns["is_template"].to_numpy(zero_copy_only=False),
        vector_ND.view(len(table), d_model),
    )


def _schema(width: int, facts: dict[str, str]) -> pa.Schema:
    return pa.schema(
        [
            pa.field("sequence", pa.int32(), nullable=False),
            pa.field("position", pa.int32(), nullable=False),
            pa.field("token_id", pa.int32(), nullable=False),
            pa.field("role", pa.int8(), nullable=False),
            pa.field("is_template", pa.bool_(), nullable=False),
            pa.field("vector", pa.binary(width), nullable=False),
        ],
        metadata=facts,
    )
