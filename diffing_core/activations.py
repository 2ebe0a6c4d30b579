"""Activation Parquet: residual vectors on disk, one set per model state, corpus and layer.

    <store>/<revision>/<corpus hash>/layer_<i>.<dtype>/00000-of-00002.parquet …

A set belongs to a model state, not to a pair, so the base's activations are written once and shared by all its
organisms. It is cut into parts (`diffing_core.activation_parts`), which an interrupted pass leaves to the next one.
Vectors are fixed-size binary in the model's own dtype: bf16 survives bit by bit at 2 bytes a value and nothing
overflows. Every row group has a checksum, which is compared whenever it is read.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diffing_core.activation_parts import CHECKSUMS, MOMENTS, checksum, complete_parts, name_of, unpacked
from diffing_core.activation_writer import ActivationWriter, SharedWriter, remove_left_over
from diffing_core.errors import StorageError
from diffing_core.lazy import torch
from diffing_core.settings import short_hash
from diffing_core.sums import Moments


@dataclass(frozen=True)
class ActivationBlock:
    """Rows of one set: N tokens with their vectors [N, D] in the stored dtype, or None where only facts were read."""

    sequence_N: np.ndarray
    position_N: np.ndarray
    token_N: np.ndarray
    role_N: np.ndarray
    template_N: np.ndarray
    vector_ND: Any


class ActivationStore:
    """The sets below one folder, and which of them are being written in this pass.

    Pairs of a cohort share their base, and so its writer: whichever of them comes first with a block writes it,
    and one that fails leaves the set to the others. Two passes may write the same parts aside of them; their
    contents are equal to rounding, the last rename wins. As a context, it abandons what nobody finished when it ends.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._writers: dict[Path, ActivationWriter] = {}

    def __enter__(self) -> "ActivationStore":
        return self

    def __exit__(self, *_: object) -> None:
        for writer in self._writers.values():
            writer.abandon()

    def folder(self, revision: str, corpus_hash: str, layer: int, dtype: Any) -> Path:
        """Where the activations of one model state in one number format, one corpus and layer lie."""
        return self._state(revision, corpus_hash) / f"layer_{layer}.{name_of(dtype)}"

    def layers(self, revision: str, corpus_hash: str, dtype: Any) -> set[int]:
        """Layers of which there is a complete set."""
        folders = self._state(revision, corpus_hash).glob("layer_*")
        found = ((folder, re.fullmatch(rf"layer_(\d+)\.{name_of(dtype)}", folder.name)) for folder in folders)
        return {int(match[1]) for folder, match in found if match and complete_parts(folder)}

    def claim(self, folder: Path, d_model: int, dtype: Any, n_rows: int) -> SharedWriter | None:
        """One pair's hand on the set, unless it is complete."""
        if folder not in self._writers:
            remove_left_over(folder)
            if complete_parts(folder):
                return None
            self._writers[folder] = ActivationWriter(folder, d_model, dtype, n_rows)
        return SharedWriter(self._writers[folder])

    def _state(self, revision: str, corpus_hash: str) -> Path:
        return self.root / re.sub(r"[^A-Za-z0-9.+-]", "_", revision) / corpus_hash


class ActivationSet:
    """One complete set, opened; rows are read by number, in one copy out of a memory map.

    Raises:
        StorageError: parts are missing, cut off, of other bytes than were written, or hold no activations.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = complete_parts(folder)
        if not files:
            raise StorageError(f"{folder} holds no complete set of activations; materialize `activations` again")
        self._parts = [_Part(file) for file in files]
        self._groups = [(part, group) for part in self._parts for group in range(part.metadata.num_row_groups)]
        sizes = [part.metadata.row_group(group).num_rows for part, group in self._groups]
        self._starts = np.cumsum([0, *sizes])
        self.dtype, self.d_model = self._parts[0].dtype, self._parts[0].d_model

    @property
    def n_rows(self) -> int:
        """Tokens stored."""
        return int(self._starts[-1])

    @property
    def n_bytes(self) -> int:
        """Size on disk."""
        return sum(part.path.stat().st_size for part in self._parts)

    @property
    def fingerprint(self) -> str:
        """16 hex digits over the footers of all parts: formats, moments and checksums of what was stored."""
        return short_hash([part.footer for part in self._parts], 16)

    def moments(self) -> Moments:
        """Mean and variance per dimension over all rows, float64: those of the parts, merged exactly."""
        whole = Moments(self.d_model)
        for part in self._parts:
            whole.merge(part.moments())
        return whole

    def rows(self, start: int, stop: int) -> ActivationBlock:
        """Rows start … stop − 1, whatever the row groups; where they lie in several, they are copied once more."""
        first, last = np.searchsorted(self._starts, (start, max(start, stop - 1)), side="right") - 1
        parts = [part.read(group) for part, group in self._groups[first : last + 1]]
        offset = int(self._starts[first])
        return self._block(pa.concat_tables(parts).slice(start - offset, stop - start))

    def blocks(self) -> Iterator[ActivationBlock]:
        """All rows, a row group at a time; memory of one group."""
        for part, group in self._groups:
            yield self._block(part.read(group))

    def facts(self) -> Iterator[ActivationBlock]:
        """All rows without their vectors, a row group at a time. Not compared with the checksums: those are of whole groups."""
        for part, group in self._groups:
            yield self._block(part.facts(group))

    def _block(self, table: pa.Table) -> ActivationBlock:
        table = table.combine_chunks()
        columns = {name: table[name].chunk(0) for name in table.schema.names}
        return ActivationBlock(
            columns["sequence"].to_numpy(),
            columns["position"].to_numpy(),
            columns["token_id"].to_numpy(),
            columns["role"].to_numpy(),
            columns["is_template"].to_numpy(zero_copy_only=False),
            _vectors_of(table, getattr(torch, self.dtype)) if "vector" in columns else None,
        )


class _Part:
    """One Parquet file of a set; open only while it is read, since a long corpus has more parts than a process may open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.metadata = pq.read_metadata(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise StorageError(f"{path} cannot be read ({error}); delete it and materialize `activations` again") from error
        self._facts = {key.decode(): value.decode() for key, value in (self.metadata.metadata or {}).items()}
        missing = {"dtype", "d_model", MOMENTS, CHECKSUMS} - self._facts.keys()
        if missing:
            raise StorageError(f"{path} is no part of stored activations: its footer names no {min(missing)}; delete and recompute it")
        self.dtype: str = self._facts["dtype"]
        self.d_model = int(self._facts["d_model"])
        self._checksums = self._facts[CHECKSUMS].split()

    @property
    def footer(self) -> list[Any]:
        """What tells its contents from others: number of rows, then format, moments and checksums."""
        return [self.metadata.num_rows, self.dtype, self.d_model, self._facts[MOMENTS], self._checksums]

    def moments(self) -> Moments:
        return unpacked(self._facts[MOMENTS], self.metadata.num_rows)

    def read(self, group: int) -> pa.Table:
        table = self._columns(group, None)
        found = checksum(table)
        if found != self._checksums[group]:
            raise self._damaged(group, f"checksum {found}, written as {self._checksums[group]}")
        return table

    def facts(self, group: int) -> pa.Table:
        return self._columns(group, [name for name in self.metadata.schema.names if name != "vector"])

    def _columns(self, group: int, names: list[str] | None) -> pa.Table:
        try:
            with pq.ParquetFile(self.path, memory_map=True, metadata=self.metadata) as file:
                return file.read_row_group(group, columns=names, use_threads=False).combine_chunks()
        except (pa.ArrowInvalid, OSError) as error:
            raise self._damaged(group, str(error)) from error

    def _damaged(self, group: int, why: str) -> StorageError:
        return StorageError(
            f"{self.path} is damaged in row group {group} ({why}); delete it and materialize `activations` again"
        )


def _vectors_of(table: pa.Table, dtype: Any) -> Any:
    """The column `vector` of a table of one chunk, [N, D] in the stored dtype; the buffer itself, no copy."""
    column = table["vector"].chunk(0)
    width = column.type.byte_width
    raw = memoryview(column.buffers()[1])
    values = torch.frombuffer(raw, dtype=dtype, count=len(table) * (width // dtype.itemsize), offset=column.offset * width)
    return values.view(len(table), -1)
