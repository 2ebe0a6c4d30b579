"""Partitions: one key per registered pair, `organism__model__variant`, and one per base model.

A grid of organisms and models would consist of cells that cannot exist for nine tenths, and every such
cell fails a backfill; the dynamic list holds exactly the pairs there are, neighbours sharing a base.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby

import dagster as dg

from diffing_core.errors import RegistryError
from diffing_core.pairs import Pair
from diffing_core.registry import Registry

PAIRS = dg.DynamicPartitionsDefinition(name="pair")
BASE_MODELS = dg.DynamicPartitionsDefinition(name="base_model")
PAIRS_PER_RUN = 12


def cohorts() -> dg.BackfillPolicy:
    """A backfill runs neighbouring pairs together, so that a base model is loaded once for several of them."""
    return dg.BackfillPolicy.multi_run(max_partitions_per_run=PAIRS_PER_RUN)


def requested_pairs(context: dg.AssetExecutionContext, registry: Registry) -> list[Pair]:
    """The pairs of this run; a key that the registry does not know ends the run without retries."""
    try:
        pairs = [Pair.parse(key) for key in context.partition_keys]
        for pair in pairs:
            registry.variant(pair)
    except RegistryError as error:
        raise dg.Failure(str(error), allow_retries=False) from error
    return pairs


def by_model(pairs: Iterable[Pair]) -> dict[str, list[Pair]]:
    """Pairs grouped by base model."""
    grouped: dict[str, list[Pair]] = {}
    for pair in pairs:
        grouped.setdefault(pair.model, []).append(pair)
    return grouped


def blocks(stored: Sequence[str], wanted: Iterable[str], most: int, workers: int = 1) -> list[list[str]]:
    """Wanted keys in blocks of neighbours of the stored order: what one run may be given as a range.

    Args:
        stored: all keys in the order in which the instance stores them.
        wanted: the keys to divide.
        most: longest block.
        workers: runs at a time; as many blocks as keep all of them busy to the end, of about equal length.
    """
    chosen = set(wanted)
    cut = []
    for is_wanted, neighbours in groupby(stored, chosen.__contains__):
        if is_wanted:
            keys = list(neighbours)
            rounds = -(-len(keys) // (most * workers))
            n = min(len(keys), rounds * workers)
            cut += [keys[len(keys) * i // n : len(keys) * (i + 1) // n] for i in range(n)]
    return cut


def sync_partitions(instance: dg.DagsterInstance, pairs: Sequence[Pair]) -> tuple[list[str], list[str]]:
    """Adds the keys of these pairs and deletes all others; returns both lists.

    Base models come together, and of each the default variants first: runs are given neighbours, and what people choose
    by hand is mostly one or the other. Pairs registered later are stored after those before.
    """
    wanted = [pair.key for pair in sorted(pairs, key=lambda pair: (pair.model, pair.variant != "default", pair))]
    present = instance.get_dynamic_partitions(PAIRS.name)
    gone = [key for key in present if key not in wanted]
    for key in gone:
        instance.delete_dynamic_partition(PAIRS.name, key)
    new = [key for key in wanted if key not in present]
    instance.add_dynamic_partitions(PAIRS.name, new)
    instance.add_dynamic_partitions(BASE_MODELS.name, sorted({pair.model for pair in pairs}))
    return new, gone
