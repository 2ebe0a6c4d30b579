"""The registry: which models, corpora and organisms there are, from YAML with one file per entry."""

from diffing_core.registry.load import Registry, add_organism, load_registry
from diffing_core.registry.schema import (
    GRADED_ARMS,
    NULL_ARMS,
    TRAINING,
    Corpus,
    Expression,
    Model,
    Organism,
    TrainingCorpus,
    Variant,
    Weights,
)
from diffing_core.registry.sources import HubRef, Source
from diffing_core.registry.toolkit import ImportReport, import_toolkit

__all__ = [
    "GRADED_ARMS",
    "NULL_ARMS",
    "TRAINING",
    "Corpus",
    "Expression",
    "HubRef",
    "ImportReport",
    "Model",
    "Organism",
    "Registry",
    "Source",
    "TrainingCorpus",
    "Variant",
    "Weights",
    "add_organism",
    "import_toolkit",
    "load_registry",
]
