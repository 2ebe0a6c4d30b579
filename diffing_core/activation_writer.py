"""Writing activations part by part, so that an interrupted pass loses no more than the part it was at.

A part is written beside its place and renamed when it is full. The rows of a corpus come in one fixed order, so the next
pass goes on after the parts that are there.
"""

import fcntl
import os
import time
import uuid
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diffing_core import activation_parts
from diffing_core.activation_parts import CHECKSUMS, MOMENTS, checksum, name_of, packed, parts_of, schema
from diffing_core.blocks import TokenBlock
from diffing_core.errors import StorageError
from diffing_core.lazy import torch
from diffing_core.sums import Moments

LEFT_OVER_AFTER_S = 60.0  # between its creation and its lock a file is nobody's


class SharedWriter:
    """One pair's hand on a set that several pairs write together: all come with the same blocks in the same order."""

    def __init__(self, file: "ActivationWriter") -> None:
        self._file = file
        self._n_rows = 0
        self.stored_rows = file.n_rows

    def skip(self, n_rows: int) -> None:
        """Passes over rows that are stored already."""
        self._n_rows += n_rows

    def add(self, block: TokenBlock, vector_ND: Any) -> None:
        """Adds those of the block's tokens that are not stored yet, by an earlier pass or another pair."""
        new = self._n_rows + len(block) - self._file.n_rows
        if new > 0:
            self._file.add(block, vector_ND, len(block) - new)
        self._n_rows += len(block)

    def close(self) -> None:
        """Makes sure that the set is complete."""
        self._file.close()


class ActivationWriter:
    """Writes one set of `n_rows` rows; `n_rows` counts those it has, from the start those of parts already there."""

    def __init__(self, folder: Path, d_model: int, dtype: Any, n_rows: int) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._parts = parts_of(folder, n_rows)
        self._expected = n_rows
        self._part = next((number for number, part in enumerate(self._parts) if not part.exists()), len(self._parts))
        self.n_rows = min(self._part * activation_parts.ROWS_PER_PART, n_rows)
        self._dtype, self._d_model = dtype, d_model
        self._schema = schema(d_model * dtype.itemsize, {"d_model": str(d_model), "dtype": name_of(dtype)})
        self._group = _Group(min(activation_parts.ROWS_PER_GROUP, n_rows - self.n_rows), d_model, dtype)
        self._open: _Part | None = None
        self._intact = True

    def add(self, block: TokenBlock, vector_ND: Any, first: int = 0) -> None:
        """Adds the block's tokens with their vectors, from row `first` on, and writes every row group that is full.

        Raises:
            StorageError: other vectors than announced, more rows than announced, or a file that could not be written.
        """
        if vector_ND.dtype != self._dtype:
            raise StorageError(f"{self.folder} holds {self._dtype}, but a block came as {vector_ND.dtype}: mend the model's dtype")
        n_added = len(block) - first
        if self.n_rows + n_added > self._expected:
            raise StorageError(f"{self.folder} is for {self._expected} rows, but {self.n_rows + n_added} came; give the corpus's tokens")
        self._require_intact()
        while first < len(block):
            n_taken = self._group.add(block, vector_ND, first)
            first, self.n_rows = first + n_taken, self.n_rows + n_taken
            if self._group.full or self.n_rows == self._expected:
                self._write()

    def close(self) -> None:
        """Makes sure that the set is complete.

        Raises:
            StorageError: rows are missing, or some could not be written.
        """
        self._require_intact()
        if self._part < len(self._parts):
            raise StorageError(f"{self.folder} is for {self._expected} rows, but {self.n_rows} came; run this pair again")

    def abandon(self) -> None:
        """Leaves no trace of an unfinished part; finished ones stay for the next pass."""
        if self._open is not None:
            self._open.remove()

    def _require_intact(self) -> None:
        if not self._intact:
            raise StorageError(f"{self.folder} could not be written by another pair of this pass; run this pair again")

    def _write(self) -> None:
        """Writes the row group, and ends the part where it is the part's last."""
        self._intact = False
        if self._open is None:
            self._open = _Part(self._parts[self._part], self._schema, self._d_model)
        self._open.write(self._group)
        self._group.n_rows = 0
        last = self._part == len(self._parts) - 1
        size = self._expected - self._part * activation_parts.ROWS_PER_PART if last else activation_parts.ROWS_PER_PART
        if self._open.n_rows == size:
            self._open.finish()
            self._open, self._part = None, self._part + 1
        self._intact = True


class _Group:
    """Room for the rows of one row group, filled again and again: each vector is copied once before it is written."""

    def __init__(self, size: int, d_model: int, dtype: Any) -> None:
        self.n_rows = 0
        self._size = size
        self._vector_GD = torch.empty(size, d_model, dtype=dtype)
        self._columns = [np.empty(size, np_type) for np_type in (np.int32, np.int32, np.int32, np.int8, np.bool_)]

    @property
    def full(self) -> bool:
        return self.n_rows == self._size

    def add(self, block: TokenBlock, vector_ND: Any, first: int) -> int:
        """Takes as many of the block's rows from `first` on as there is room for; returns their number."""
        taken = slice(first, first + self._size - self.n_rows)
        vector_TD = vector_ND[taken]
        place = slice(self.n_rows, self.n_rows + len(vector_TD))
        self._vector_GD[place] = vector_TD
        values = (block.sequence_N, block.position_N, block.token_N.cpu().numpy(), block.role_N, block.template_N)
        for column_G, value_N in zip(self._columns, values, strict=True):
            column_G[place] = value_N[taken]
        self.n_rows = place.stop
        return len(vector_TD)

    def vectors(self) -> Any:
        """[n_rows, D] in the stored dtype; a view, good until the next row comes."""
        return self._vector_GD[: self.n_rows]

    def table(self, columns: pa.Schema) -> pa.Table:
        """The rows as a table; its vectors are a view, good until the next row comes."""
        raw = pa.py_buffer(self.vectors().view(torch.uint8).numpy())
        vectors = pa.FixedSizeBinaryArray.from_buffers(columns.field("vector").type, self.n_rows, [None, raw])
        arrays = [pa.array(column_G[: self.n_rows]) for column_G in self._columns]
        return pa.Table.from_arrays([*arrays, vectors], schema=columns)


class _Part:
    """One part while it is written: a hidden file, locked, so that what a killed process left can be told from it."""

    def __init__(self, path: Path, columns: pa.Schema, d_model: int) -> None:
        self._path, self._columns = path, columns
        self._aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        self._held = _locked(self._aside)
        self._moments = Moments(d_model)
        self._checksums: list[str] = []
        self._writer = pq.ParquetWriter(self._aside, columns, compression="none", use_dictionary=False, write_statistics=False)

    @property
    def n_rows(self) -> int:
        return self._moments.count

    def write(self, group: _Group) -> None:
        table = group.table(self._columns)
        self._writer.write_table(table, row_group_size=len(table))
        self._checksums.append(checksum(table))
        self._moments.add(group.vectors().float().numpy())

    def finish(self) -> None:
        self._writer.add_key_value_metadata({MOMENTS: packed(self._moments), CHECKSUMS: " ".join(self._checksums)})
        self._writer.close()
        os.replace(self._aside, self._path)
        self._held.close()

    def remove(self) -> None:
        self._writer.close()
        self._aside.unlink(missing_ok=True)
        self._held.close()


def remove_left_over(folder: Path) -> None:
    """Removes unfinished parts of processes that are no more."""
    for file in folder.glob(".*-of-*"):
        try:
            with file.open("rb") as unfinished:
                fcntl.flock(unfinished, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - file.stat().st_mtime > LEFT_OVER_AFTER_S:
                    file.unlink()
        except (BlockingIOError, FileNotFoundError):
            continue  # somebody writes it, or has just finished it


def _locked(file: Path) -> IO[bytes]:
    """The file, created, under a lock that the system releases however this process ends."""
    held = file.open("wb")
    fcntl.flock(held, fcntl.LOCK_EX)
    return held
