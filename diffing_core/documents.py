"""Documents of a corpus, one by one, from its own texts or from JSONL, Parquet, Arrow and text files.

    .jsonl, .jsonl.gz   one record per line        .parquet, .arrow   one record per row; a part of the file in memory
    .txt                documents are separated by blank lines

An Arrow file is a stream, as `Dataset.save_to_disk` of Hugging Face datasets writes it.
"""

import gzip
import json
import random
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from diffing_core.errors import CorpusError
from diffing_core.registry import Corpus, HubRef
from diffing_core.registry.datasets import corpus_files

PARQUET_ROWS = 1024


def documents(spec: Corpus, place: Path | HubRef | None) -> Iterator[Any]:
    """What a corpus's column holds, in the order of the source, `read_at_most` of them.

    Raises:
        CorpusError: no such file, or a file that cannot be read as what it is called.
    """
    found = spec.texts if place is None else _all(corpus_files(spec, place), spec.column)
    return islice(found, spec.read_at_most)


def drawn(found: Iterable[Any], wanted: int, seed: int) -> tuple[list[Any], int]:
    """Uniform sample and the number of all, by reservoir: one read, memory of the sample only, order kept."""
    draw = random.Random(seed)
    reservoir: list[tuple[int, Any]] = []
    count = 0
    for count, document in enumerate(found, start=1):
        if len(reservoir) < wanted:
            reservoir.append((count, document))
        elif (place := draw.randrange(count)) < wanted:
            reservoir[place] = (count, document)
    return [document for _, document in sorted(reservoir, key=lambda item: item[0])], count


def _all(files: Iterable[Path], column: str) -> Iterator[Any]:
    readers = {".jsonl": _jsonl, ".jsonl.gz": _jsonl, ".parquet": _parquet, ".arrow": _arrow, ".txt": _paragraphs}
    for file in files:
        reader = next((reader for ending, reader in readers.items() if file.name.endswith(ending)), None)
        if reader is None:
            raise CorpusError(f"{file.name}: corpora are read from {', '.join(readers)}; save it as one of these")
        yield from reader(file, column)


def _jsonl(file: Path, column: str) -> Iterator[Any]:
    opened = gzip.open if file.suffix == ".gz" else open
    with opened(file, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise CorpusError(f"{file.name}, line {number}: not JSON: {error}") from error
            if not isinstance(record, dict) or column not in record:
                found = sorted(record) if isinstance(record, dict) else f"a {type(record).__name__}"
                raise CorpusError(f"{file.name}, line {number}: no field {column!r}; found {found}")
            yield record[column]


def _parquet(file: Path, column: str) -> Iterator[Any]:
    import pyarrow.parquet as pq

    parquet = pq.ParquetFile(file)
    _check_column(file, column, parquet.schema_arrow.names)
    for batch in parquet.iter_batches(batch_size=PARQUET_ROWS, columns=[column]):
        yield from batch.column(0).to_pylist()


def _arrow(file: Path, column: str) -> Iterator[Any]:
    import pyarrow as pa

    with pa.memory_map(str(file)) as mapped:
        try:
            stream = pa.ipc.open_stream(mapped)
        except pa.ArrowInvalid as error:
            told = f"{file.name}: not an Arrow stream ({error}); save it with Dataset.save_to_disk"
            raise CorpusError(told) from error
        _check_column(file, column, stream.schema.names)
        for batch in stream:
            yield from batch.column(column).to_pylist()


def _check_column(file: Path, column: str, names: list[str]) -> None:
    if column not in names:
        raise CorpusError(f"{file.name}: no column {column!r}; found {names}")


def _paragraphs(file: Path, _: str) -> Iterator[str]:
    lines: list[str] = []
    with file.open(encoding="utf-8") as opened:
        for line in chain(opened, [""]):
            if line.strip():
                lines.append(line)
            elif lines:
                yield "".join(lines).strip("\n")
                lines = []
