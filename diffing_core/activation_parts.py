"""Parts of a set of stored activations: how they are cut, named and described.

A set is a folder of Parquet files `00003-of-00008.parquet`, each of ROWS_PER_PART rows but the last one, which holds
the rest. How many there will be is known from the corpus, so a folder says itself whether it is complete.
"""

import base64
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from diffing_core.sums import Moments

ROWS_PER_GROUP = 8192
ROWS_PER_PART = 8 * ROWS_PER_GROUP  # what an interrupted pass may lose
MOMENTS, CHECKSUMS = "moments", "checksums"
WORDS_SUMMED = 512  # words of 8 bytes whose order a checksum cannot tell


def name_of(dtype: Any) -> str:
    """A torch dtype without its library: float32, bfloat16, …"""
    return str(dtype).removeprefix("torch.")


def parts_of(folder: Path, n_rows: int) -> list[Path]:
    """Where the parts of so many rows lie, or will."""
    n_parts = max(1, -(-n_rows // ROWS_PER_PART))
    return [folder / f"{number:05d}-of-{n_parts:05d}.parquet" for number in range(n_parts)]


def complete_parts(folder: Path) -> list[Path]:
    """The parts of a complete set in their order; none where some are missing."""
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("[0-9]*-of-*.parquet")):
        found.setdefault(file.stem.split("-of-")[1], []).append(file)
    return next((files for n_parts, files in found.items() if len(files) == int(n_parts)), [])


def schema(width: int, facts: Mapping[str, str]) -> pa.Schema:
    """Columns of a part; `width`: bytes of one vector."""
    return pa.schema(
        [
            pa.field("sequence", pa.int32(), nullable=False),
            pa.field("position", pa.int32(), nullable=False),
            pa.field("token_id", pa.int32(), nullable=False),
            pa.field("role", pa.int8(), nullable=False),
            pa.field("is_template", pa.bool_(), nullable=False),
            pa.field("vector", pa.binary(width), nullable=False),
        ],
        metadata=dict(facts),
    )


def packed(moments: Moments) -> str:
    """Mean and sum of squared deviations of a part, float64, as text for its footer."""
    return base64.b64encode(np.stack([moments.mean_D, moments.squares_D]).tobytes()).decode()


def unpacked(text: str, count: int) -> Moments:
    """The moments of a part of `count` rows."""
    mean_D, squares_D = np.frombuffer(base64.b64decode(text)).reshape(2, -1)
    return Moments.of(count, mean_D, squares_D)


def checksum(group: pa.Table) -> str:
    """16 hex digits over a row group of one chunk per column, several times as fast as a CRC of the vectors.

    The vectors' words of 8 bytes are summed by WORDS_SUMMED, and these sums with odd weights, modulo 2⁶⁴: a change of any one
    word shows for certain, any other but for a chance of about 2⁻⁶⁴; words exchanged within one such sum do not show.
    """
    column = group["vector"].chunk(0)
    width = column.type.byte_width
    raw = np.frombuffer(column.buffers()[1], np.uint8, len(group) * width, column.offset * width)
    words = raw[: len(raw) // (8 * WORDS_SUMMED) * 8 * WORDS_SUMMED].view(np.uint64).reshape(-1, WORDS_SUMMED)
    weights = 2 * np.arange(len(words), dtype=np.uint64) + np.uint64(1)
    total = int((words.sum(1, dtype=np.uint64) * weights).sum(dtype=np.uint64))
    rest = zlib.crc32(raw[words.nbytes :])
    for name in group.schema.names[:-1]:
        rest = zlib.crc32(group[name].chunk(0).to_numpy(zero_copy_only=False).tobytes(), rest)
    return f"{(total + rest * 0x9E3779B97F4A7C15) % 2**64:016x}"
