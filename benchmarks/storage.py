"""Activation Parquet against a raw memory map of the same values."""

import tempfile
from pathlib import Path

import numpy as np

from benchmarks.figure import Figure, in_turn, wall_s
from diffing_core.activations import ActivationWriter, read_activations
from diffing_core.blocks import TokenBlock

WIDTH, ROWS, PER_BLOCK = 2048, 65536, 4096


def parquet() -> list[Figure]:
    """Read rate and size for bf16 vectors of a real width."""
    import torch

    vector_ND = torch.randn(PER_BLOCK, WIDTH).to(torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        file, raw = Path(folder) / "layer_0.parquet", Path(folder) / "raw"
        write_s = wall_s(lambda: _write(file, vector_ND))
        raw.write_bytes(vector_ND.view(torch.uint8).numpy().tobytes() * (ROWS // PER_BLOCK))
        taken = in_turn({"parquet": lambda: _read(file), "memory map": lambda: _read_raw(raw)}, 5, wall_s)
        size = file.stat().st_size / (ROWS * WIDTH)
    gigabytes = ROWS * WIDTH * 2 / 1e9
    rates = {f"{name} (GB/s)": gigabytes / seconds for name, seconds in taken.items()}
    return [
        Figure("parquet_read_over_memmap", taken["parquet"] / taken["memory map"], "×", 1.5, "lower", rates),
        Figure("parquet_bytes_per_value", size, "bytes", 2.1, "lower", {"write (GB/s)": gigabytes / write_s}),
    ]


def encodings(rows: int = 16384) -> list[Figure]:
    """Why vectors are fixed-size binary: the same bf16 values as list columns, read back to arrays."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    values = torch.randn(rows, WIDTH).to(torch.bfloat16)
    wide = pa.array(values.float().numpy().reshape(-1))
    lists = pa.table({"vector": pa.FixedSizeListArray.from_arrays(wide, WIDTH)})
    with tempfile.TemporaryDirectory() as folder:
        raw, plain, packed = (Path(folder) / name for name in ("raw", "plain", "packed"))
        raw.write_bytes(values.view(torch.uint8).numpy().tobytes())
        pq.write_table(lists, plain, compression="none", use_dictionary=False)
        split = {"vector.list.element": "BYTE_STREAM_SPLIT"}
        pq.write_table(lists, packed, compression="zstd", use_dictionary=False, column_encoding=split)
        taken = in_turn(
            {
                "map": lambda: np.array(np.memmap(raw, np.int16, "r")),
                "list": lambda: _read_lists(plain),
                "list, split and zstd": lambda: _read_lists(packed),
            },
            3,
            wall_s,
        )
        sizes = {f"{file.name} (bytes/value)": file.stat().st_size / (rows * WIDTH) for file in (plain, packed)}
    ratios = {f"{name} over map": seconds / taken["map"] for name, seconds in taken.items() if name != "map"}
    return [Figure("parquet_list_column_over_memmap", ratios["list over map"], "×", None, "lower", ratios | sizes)]


def _read_lists(file: Path) -> np.ndarray:
    import pyarrow.parquet as pq

    return pq.read_table(file, use_threads=False)["vector"].combine_chunks().flatten().to_numpy()


def _write(file: Path, vector_ND) -> None:
    import torch

    writer = ActivationWriter(file, WIDTH, torch.bfloat16)
    index_N = np.arange(PER_BLOCK)
    role_N, template_N = np.zeros(PER_BLOCK, np.int8), np.zeros(PER_BLOCK, bool)
    token_N = torch.from_numpy(index_N)
    for _ in range(ROWS // PER_BLOCK):
        writer.add(TokenBlock(token_N, token_N, index_N, index_N, role_N, template_N, None, None), vector_ND)
    writer.close()


def _read(file: Path) -> float:
    """Sum of every value's bit pattern, so that each byte is touched."""
    import torch

    return sum(int(block.vector_ND.view(torch.int16).numpy().sum(dtype=np.int64)) for block in read_activations(file))


def _read_raw(raw: Path) -> float:
    mapped = np.memmap(raw, dtype=np.int16, mode="r").reshape(ROWS, WIDTH)
    return sum(int(mapped[start : start + 8192].sum(dtype=np.int64)) for start in range(0, ROWS, 8192))
