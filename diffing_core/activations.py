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
        folder = self.root / re.sub(r"[^A-Za-z0-9.+-]", "_", revision) / corpus_hash
        return folder / f"layer_{layer}.{name_of(dtype)}.parquet"

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
            self._aside, _schema(self._width, facts), compression="none", use_dictionary=False
        )
        self._pending: list[pa.RecordBatch] = []
        self._intact = True
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
        if sum(map(len, self._pending)) >= ROWS_PER_GROUP:
            self._flush()

    def close(self) -> None:
        """Declares the file complete."""
        if not self._writer.is_open:
            return
        self._flush()
        self._writer.close()
        os.replace(self._aside, self.path)

    def abandon(self) -> None:
        """Leaves no trace of an unfinished file; a finished one stays."""
        self._writer.close()
        self._aside.unlink(missing_ok=True)

    def _flush(self) -> None:
        if not self._intact:
            raise StorageError(f"{self.path} could not be written by another pair of this pass; run this pair again")
        if self._pending:
            self._intact = False
            self._writer.write_table(pa.Table.from_batches(self._pending))
            self._pending, self._intact = [], True


def name_of(dtype: Any) -> str:
    """A torch dtype without its library: float32, bfloat16, …"""
    return str(dtype).removeprefix("torch.")


def read_activations(path: Path) -> Iterator[ActivationBlock]:
    """The rows of one file, a row group at a time; memory of one group, no copy of the vectors."""
    file = pq.ParquetFile(path, memory_map=True)
    facts = {key.decode(): value.decode() for key, value in (file.schema_arrow.metadata or {}).items()}
    if "dtype" not in facts:
        raise StorageError(f"{path} is not an activation file: its schema names no dtype; delete and recompute it")
    for group in range(file.num_row_groups):
        yield _block(file.read_row_group(group).combine_chunks(), int(facts["d_model"]), facts["dtype"])


def _block(table: pa.Table, d_model: int, dtype: str) -> ActivationBlock:
    columns = {name: table[name].chunk(0) for name in table.schema.names}
    kind = getattr(torch, dtype)
    raw = columns["vector"].buffers()[1]
    vector_ND = torch.frombuffer(memoryview(raw), dtype=kind, count=len(table) * d_model).view(len(table), d_model)
    return ActivationBlock(
        columns["sequence"].to_numpy(),
        columns["position"].to_numpy(),
        columns["token_id"].to_numpy(),
        columns["role"].to_numpy(),
        columns["is_template"].to_numpy(zero_copy_only=False),
        vector_ND,
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
