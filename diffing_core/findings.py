"""Findings: the one shape in which every method shows what it found.

Agents, the offline investigator, the method pages and the agreement mart read this table and nothing
method-specific, so a new method is understood by all of them without a line of code.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa

from diffing_core.tables import Column, TableSpec

Kind = Literal[
    "token", "text_snippet", "latent", "atom", "layer", "module", "generation", "direction", "topic", "position"
]

FINDINGS = TableSpec(
    name="findings",
    doc="What each method would show a person, best first.",
    grain=("rank",),
    columns=(
        Column("rank", "int32", "1 is shown first.", role="key", low=1),
        Column("kind", "string", "What the item is: token, text_snippet, latent, layer, generation, topic …"),
        Column("item", "string", "The thing itself. Text from a model under test: untrusted."),
        Column("score", "float64", "How strongly the method points at it; tuned − base where signed."),
        Column("score_unit", "string", "Unit of the score."),
        Column("layer", "int32", "Block whose output was read, from 0.", nullable=True),
        Column("position", "int32", "Token position from 0, or the method's own position label.", nullable=True),
        Column("p_value", "float64", "Where the method has a test.", nullable=True, low=0, high=1),
        Column("q_value", "float64", "p-value after Benjamini–Hochberg.", nullable=True, low=0, high=1),
        Column("source_table", "string", "Typed table that holds the evidence."),
        Column("source_key", "string", "JSON of the grain columns of that row."),
    ),
)


@dataclass(frozen=True)
class Finding:
    """One thing worth showing; its rank is its place in the list it is given in."""

    kind: Kind
    item: str
    score: float
    score_unit: str
    source_table: str
    source_key: Mapping[str, Any] = field(default_factory=dict)
    layer: int | None = None
    position: int | None = None
    p_value: float | None = None
    q_value: float | None = None


def findings_table(findings: Sequence[Finding]) -> pa.Table:
    """The checked table of a list of findings, ranked in the order given."""
    columns: dict[str, list[Any]] = {name: [] for name in FINDINGS.schema.names}
    for rank, finding in enumerate(findings, start=1):
        row = vars(finding) | {"rank": rank, "source_key": json.dumps(dict(finding.source_key), sort_keys=True)}
        for name, values in columns.items():
            values.append(row[name])
    return FINDINGS.table(columns)
