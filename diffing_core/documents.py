"""Documents of a corpus, one by one, from its own texts or from JSON, Parquet, Arrow and text files.

    .jsonl, .jsonl.gz   one record per line        .parquet, .arrow   one record per row; a part of the file in memory
    .json, .json.gz     the same, or one list of records, which is in memory as a whole
    .txt                documents are separated by blank lines

An Arrow file is a stream, as `Dataset.save_to_disk` of Hugging Face datasets writes it.
"""

import gzip
import io
import json
import random
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from diffing_core.errors import CorpusError
from diffing_core.registry import Corpus, HubRef
from diffing_core.registry.datasets import corpus_files
from diffing_core.registry.remote_file import RemoteFile
from diffing_core.registry.sources import reaching

PARQUET_ROWS = 1024
COLUMN_AHEAD_BYTES = 2**16  # a row group's column is asked for as a whole; what follows it is another column
File = Path | RemoteFile


def documents(spec: Corpus, place: Path | HubRef | None) -> Iterator[Any]:
    """What a corpus's column holds, in the order of the source, `read_at_most` of them.

    Raises:
        CorpusError: no such file, or a file that cannot be read as what it is called.
        ModelLoadError: a file of the hub cannot be reached.
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


def _all(files: Iterable[File], column: str) -> Iterator[Any]:
    readers = {
        **dict.fromkeys((".jsonl", ".jsonl.gz"), _jsonl),
        **dict.fromkeys((".json", ".json.gz"), _json),
        ".parquet": _parquet,
        ".arrow": _arrow,
        ".txt": _paragraphs,
    }
    for file in files:
        reader = next((reader for ending, reader in readers.items() if file.name.endswith(ending)), None)
        if reader is None:
            raise CorpusError(f"{file.name}: corpora are read from {', '.join(readers)}; save it as one of these")
        with reaching(file.place) if isinstance(file, RemoteFile) else nullcontext(), _named_if_damaged(file):
            yield from reader(file, column)


@contextmanager
def _named_if_damaged(file: File) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error, pa.ArrowException) as error:
        raise CorpusError(f"{file.name} cannot be read: {error}; it is damaged, or its text is not UTF-8") from error


@contextmanager
def _lines(file: File) -> Iterator[TextIO]:
    with (file.open("rb") if isinstance(file, Path) else file.open()) as raw:
        yield io.TextIOWrapper(gzip.GzipFile(fileobj=raw) if file.name.endswith(".gz") else raw, encoding="utf-8-sig")


def _jsonl(file: File, column: str) -> Iterator[Any]:
    with _lines(file) as lines:
        yield from _records(file, lines, column)


def _json(file: File, column: str) -> Iterator[Any]:
    with _lines(file) as lines:
        opening = list(_up_to_text(lines))
        if not "".join(opening).lstrip().startswith("["):
            yield from _records(file, chain(opening, lines), column)
            return
        try:
            records = json.loads("".join(opening) + lines.read())
        except json.JSONDecodeError as error:
            raise CorpusError(f"{file.name}: not JSON: {error}") from error
    for number, record in enumerate(records, start=1):
        yield _field(record, column, f"{file.name}, record {number}")


def _up_to_text(lines: Iterable[str]) -> Iterator[str]:
    """Blank lines and the first that is none."""
    for line in lines:
        yield line
        if line.strip():
            return


def _records(file: File, lines: Iterable[str], column: str) -> Iterator[Any]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            told = f"{file.name}, line {number}: not JSON: {error}; one record per line is expected"
            if ".jsonl" not in file.name:
                told += ", or one list of records; a file that is no data stays out if README.md names the others (configs:)"
            raise CorpusError(told) from error
        yield _field(record, column, f"{file.name}, line {number}")


def _field(record: Any, column: str, where: str) -> Any:
    if not isinstance(record, dict) or column not in record:
        found = sorted(record) if isinstance(record, dict) else f"a {type(record).__name__}"
        raise CorpusError(f"{where}: no field {column!r}; found {found}")
    return record[column]


def _parquet(file: File, column: str) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(file if isinstance(file, Path) else file.open(COLUMN_AHEAD_BYTES)) as parquet:
        _check_column(file, column, parquet.schema_arrow.names)
        for group in range(parquet.num_row_groups):  # asked for all of them, it reads ahead, to the end of the file
            for batch in parquet.iter_batches(batch_size=PARQUET_ROWS, row_groups=[group], columns=[column]):
                yield from batch.column(0).to_pylist()


def _arrow(file: File, column: str) -> Iterator[Any]:
    import pyarrow as pa

    with pa.memory_map(str(file)) if isinstance(file, Path) else pa.PythonFile(file.open(), "r") as opened:
        try:
            stream = pa.ipc.open_stream(opened)
        except pa.ArrowInvalid as error:
            told = f"{file.name}: not an Arrow stream ({error}); save it with Dataset.save_to_disk"
            raise CorpusError(told) from error
        _check_column(file, column, stream.schema.names)
        for batch in stream:
            yield from batch.column(column).to_pylist()


def _check_column(file: File, column: str, names: list[str]) -> None:
    if column not in names:
        raise CorpusError(f"{file.name}: no column {column!r}; found {names}")


def _paragraphs(file: Path, _: str) -> Iterator[str]:
    lines: list[str] = []
    with file.open(encoding="utf-8-sig") as opened:
        for line in chain(opened, [""]):
            if line.strip():
                lines.append(line)
            elif lines:
                yield "".join(lines).strip("\n")
                lines = []
