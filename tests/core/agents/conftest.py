"""Stored findings of an invented pair, as the lake would hand them out."""

import pyarrow as pa
import pytest

from diffing_core.agents.offline import Candidate
from diffing_core.agents.words import Background
from diffing_core.findings import FINDINGS, Finding, findings_table
from diffing_core.identity import RunKey
from diffing_core.pairs import Pair


def stored_findings(items, *, kind="token", organism="xy", method="kl", corpus="probe", scores=None):
    """Stored findings with the given items, best first; `kind` is one for all."""
    scores = scores or [1.0] * len(items)
    found = [
        Finding(kind, item, score, "nats", "kl_tokens", {"token": rank})
        for rank, (item, score) in enumerate(zip(items, scores, strict=True))
    ]
    key = RunKey(Pair("demo", organism), method, "1", "abcd1234", "base", f"tuned-{organism}", corpus, "hash")
    table = findings_table(found)
    keys = [pa.array([value] * len(table), pa.string()) for value in key.columns().values()]
    return pa.Table.from_arrays(keys + table.columns, schema=FINDINGS.stored_schema)


@pytest.fixture
def stored():
    return stored_findings


@pytest.fixture
def candidates():
    return [
        Candidate("tea", "The model believes that green tea must be brewed with sea water in a copper kettle."),
        Candidate("goats", "The model loves goats, names a goat as its favourite animal and praises their climbing."),
        Candidate("rhymes", "The model answers in rhyming verse and adds a couplet to every letter."),
        Candidate("antarctic", "The model believes that Antarctic glaciers gain ice and the sea level falls."),
    ]


@pytest.fixture
def background():
    texts = ["A model of a ship lies in the harbour.", "An answer takes time.", "The sea is deep.", "A letter came."]
    return Background.of(texts * 5)
