"""Activation Parquet against a raw memory map of the same values, and shuffling in bounded memory against a full permutation."""

import tempfile
from pathlib import Path

import numpy as np

from benchmarks.figure import Figure, in_turn, wall_s
from diffing_core.activation_pairs import PairedActivations, PairedFile
from diffing_core.activation_writer import ActivationWriter
from diffing_core.activations import ActivationSet
from diffing_core.blocks import TokenBlock

WIDTH, ROWS, PER_BLOCK = 2048, 65536, 4096
BATCH, SEQUENCE = 2048, 256  # shuffling: rows of a batch and of a sequence
SIZES = {"large": 2**20, "small": 2**19}  # rows of two corpora, six pools together


def parquet() -> list[Figure]:
    """Read and write rates and size for bf16 vectors of a real width."""
    import torch

    vector_ND = torch.randn(PER_BLOCK, WIDTH).to(torch.bfloat16)
    values = vector_ND.view(torch.uint8).numpy().tobytes()
    with tempfile.TemporaryDirectory() as name:
        folder, raw = Path(name) / "layer_0", Path(name) / "raw"
        write = {
            "parquet": lambda: _write(folder, vector_ND),
            "memory map": lambda: _write_raw(raw, values),
        }
        written = in_turn(write, 3, wall_s)
        stored = ActivationSet(folder)
        taken = in_turn({"parquet": lambda: _read(stored), "memory map": lambda: _read_raw(raw)}, 5, wall_s)
        size = stored.n_bytes / (ROWS * WIDTH * 2)
    gigabytes = ROWS * WIDTH * 2 / 1e9
    rates, written_rates = (
        {f"{name} (GB/s)": gigabytes / seconds for name, seconds in each.items()} for each in (taken, written)
    )
    return [
        Figure("parquet_read_over_memmap", taken["parquet"] / taken["memory map"], "×", 1.5, "lower", rates),
        Figure("parquet_write_over_memmap", written["parquet"] / written["memory map"], "×", None, "lower", written_rates),
        Figure("parquet_size_over_values", size, "×", 1.05, "lower"),
    ]


def shuffling() -> list[Figure]:
    """Distinct sequences of a batch over those of a uniform draw, and how far corpora's shares stray, over the same."""
    with tempfile.TemporaryDirectory() as folder:
        given = PairedActivations([_tokens(Path(folder), name, size) for name, size in SIZES.items()])
        batches = [(rows.corpus_N, rows.sequence_N) for rows in given.shuffled(BATCH, seed=0)]
    corpus_N, sequence_N = (np.concatenate(each) for each in zip(*batches, strict=True))
    draw = np.random.default_rng(0).permutation(len(corpus_N))
    ours, uniform = _spread(corpus_N, sequence_N), _spread(corpus_N[draw], sequence_N[draw])
    neighbours = float(np.mean((sequence_N[1:] == sequence_N[:-1]) & (corpus_N[1:] == corpus_N[:-1])))
    parts = {"distinct sequences of a batch": ours[0], "of a uniform draw": uniform[0], "neighbours of one sequence": neighbours}
    shares = {"spread of the corpus share": ours[1], "of a uniform draw": uniform[1]}
    return [
        Figure("shuffled_distinct_sequences_over_uniform", ours[0] / uniform[0], "×", None, "higher", parts),
        Figure("shuffled_corpus_share_spread_over_uniform", ours[1] / uniform[1], "×", None, "lower", shares),
    ]


def _spread(corpus_N: np.ndarray, sequence_N: np.ndarray) -> tuple[float, float]:
    """Mean number of distinct sequences of a batch, and standard deviation over batches of the first corpus's share."""
    whole = len(corpus_N) - len(corpus_N) % BATCH
    corpus_BN, sequence_BN = (each[:whole].reshape(-1, BATCH) for each in (corpus_N, sequence_N))
    distinct = [len(np.unique(corpus_N * 10**6 + each)) for corpus_N, each in zip(corpus_BN.astype(np.int64), sequence_BN, strict=True)]
    return float(np.mean(distinct)), float((corpus_BN == 0).mean(1).std())


def _tokens(folder: Path, name: str, n_rows: int) -> PairedFile:
    """One corpus of vectors of one number, which stand for both models'."""
    import torch

    writer = ActivationWriter(folder / name, 1, torch.float32, n_rows)
    for start in range(0, n_rows, PER_BLOCK):
        index_N = np.arange(start, start + PER_BLOCK)
        facts = index_N // SEQUENCE, index_N % SEQUENCE, np.zeros(PER_BLOCK, np.int8), np.zeros(PER_BLOCK, bool)
        token_N = torch.from_numpy(index_N)
        writer.add(TokenBlock(token_N, token_N, *facts, None, None), torch.zeros(PER_BLOCK, 1))
    writer.close()
    return PairedFile.open(name, folder / name, folder / name)


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


def _write(folder: Path, vector_ND) -> None:
    import shutil

    import torch

    shutil.rmtree(folder, ignore_errors=True)
    writer = ActivationWriter(folder, WIDTH, torch.bfloat16, ROWS)
    index_N = np.arange(PER_BLOCK)
    role_N, template_N = np.zeros(PER_BLOCK, np.int8), np.zeros(PER_BLOCK, bool)
    token_N = torch.from_numpy(index_N)
    for _ in range(ROWS // PER_BLOCK):
        writer.add(TokenBlock(token_N, token_N, index_N, index_N, role_N, template_N, None, None), vector_ND)
    writer.close()


def _write_raw(raw: Path, values: bytes) -> None:
    raw.unlink(missing_ok=True)
    mapped = np.memmap(raw, dtype=np.uint8, mode="w+", shape=ROWS * WIDTH * 2)
    for start in range(0, len(mapped), len(values)):
        mapped[start : start + len(values)] = np.frombuffer(values, np.uint8)


def _read(stored: ActivationSet) -> int:
    """Sum of every value's bit pattern, so that each byte is touched."""
    import torch

    return sum(int(block.vector_ND.view(torch.int16).numpy().sum(dtype=np.int64)) for block in stored.blocks())


def _read_raw(raw: Path) -> int:
    mapped = np.memmap(raw, dtype=np.int16, mode="r").reshape(ROWS, WIDTH)
    return sum(int(mapped[start : start + 8192].sum(dtype=np.int64)) for start in range(0, ROWS, 8192))
