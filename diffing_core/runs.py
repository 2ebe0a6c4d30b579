"""The table `runs`: one row per finished result, written last, with its whole identity and cost."""

import json
from dataclasses import dataclass
from datetime import datetime

import pyarrow as pa

from diffing_core.identity import RunKey
from diffing_core.settings import Settings
from diffing_core.tables import Column, TableSpec

RUNS = TableSpec(
    name="runs",
    doc="Finished results. Rows of other tables count only if their run_id is here: it is written last.",
    grain=(),
    columns=(
        Column("step", "string", "diff, expression, calibration, hypotheses or grades."),
        Column("version", "string", "Version of the method, bumped by hand when its numbers change."),
        Column("settings", "string", "The settings as canonical JSON."),
        Column("corpus_hash", "string", "Content hash of the probe tokens that methods see; empty where none are read."),
        Column("model_revision", "string", "Hash or commit of the base side, @ number format, +served if a server writes its texts."),
        Column("adapter_hash", "string", "Hash or commit of the tuned side, @ number format, +served if a server writes its texts."),
        Column("finished_at", "timestamp", "When the result was complete, UTC."),
        Column("n_sequences", "int64", "Probe sequences read.", role="count", low=0),
        Column("n_tokens", "int64", "Probe tokens that methods saw: no padding, none that are skipped.", role="count", low=0),
        Column("compute_s", "float64", "Time of the method's own work, forward passes excluded.", "s", low=0),
        Column("shared_s", "float64", "Time of the forward passes shared with the other methods.", "s", low=0),
        Column("cost_usd", "float64", "Money paid to model providers.", "USD", low=0),
    ),
)


@dataclass(frozen=True)
class Cost:
    """What a result took. Shared time is counted once per pass, not once per method."""

    n_sequences: int = 0
    n_tokens: int = 0
    compute_s: float = 0.0
    shared_s: float = 0.0
    cost_usd: float = 0.0


def run_row(key: RunKey, settings: Settings, cost: Cost, finished_at: datetime) -> pa.Table:
    """The one row that declares a result finished."""
    row = vars(cost) | {
        "step": key.step,
        "version": key.version,
        "settings": json.dumps(settings.model_dump(mode="json"), sort_keys=True),
        "corpus_hash": key.corpus_hash,
        "model_revision": key.model_revision,
        "adapter_hash": key.adapter_hash,
        "finished_at": finished_at,
    }
    return RUNS.table({name: [value] for name, value in row.items()})
