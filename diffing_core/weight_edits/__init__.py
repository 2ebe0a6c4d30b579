"""Edited weights: amplified, negated, summed, merged, truncated and ablated finetunes as ordinary folders.

    specification.py    what is to be written, as YAML                     presets.yaml   amplifications that come along
    finetunes.py        the finetunes that it names, as weights on disk
    changes.py          the change of each tensor, weighed and added up    merging.py     TIES, DARE and others, by PEFT
    turning.py          a change with directions at random, as a control
    adapter_folder.py   low-rank changes -> a PEFT folder                  checkpoint_folder.py   others -> a checkpoint
    folders.py          whole edits: named by content, atomic, with a note of what they were made of
    running.py          an edited model as a Subject, for as long as a `with` block lasts

Nothing is patched anywhere: stock PEFT, transformers and vLLM load what is written.
"""

from diffing_core.weight_edits.changes import Term, left_out
from diffing_core.weight_edits.finetunes import Finetunes, term_of
from diffing_core.weight_edits.folders import write_edit
from diffing_core.weight_edits.running import edited_subject
from diffing_core.weight_edits.specification import (
    AdapterEdit,
    Amplification,
    WeightEdit,
    amplified,
    preset,
    presets,
    read_specification,
    resolve,
    uniform,
)

__all__ = [
    "AdapterEdit",
    "Amplification",
    "Finetunes",
    "Term",
    "WeightEdit",
    "amplified",
    "edited_subject",
    "left_out",
    "preset",
    "presets",
    "read_specification",
    "resolve",
    "term_of",
    "uniform",
    "write_edit",
]
