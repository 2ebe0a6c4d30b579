"""The other registered finetunes of a pair's base model, as weights on disk.

A task vector is τ = tuned − base model, also for a pair whose base side is another finetune (a seed twin): only
what is counted from the same point can be compared. A peer that is not on this machine or cannot be fetched keeps
its place in the list, with the reason; nothing is downloaded for it. Its own run fills the gap later.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from diffing_core.adapters import is_switchable
from diffing_core.errors import DiffingError, ModelLoadError
from diffing_core.pairs import Pair
from diffing_core.registry import Registry, Variant
from diffing_core.registry.sources import Source, fetch, is_on_disk
from diffing_core.settings import short_hash
from diffing_core.weight_files import WeightSide
from diffing_core.weights import WeightPair

Relation = Literal["variant", "twin", "original", "other"]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Peer:
    """Another finetune of the same base.

    Attributes:
        relation: to the pair it is a peer of: `variant` of its organism; `twin`, trained anew to be compared with
            one of these variants; `original`, of which the pair is the twin; or `other`.
        revision: content hash or commit of its weights; empty if they cannot be had.
        weights: its task vector's two sides; None if they cannot be had.
        is_whole: it is a whole checkpoint, or is merged into one, and has to be read through with its base.
        problem: why its weights cannot be had.
    """

    pair: Pair
    relation: Relation
    revision: str = ""
    weights: WeightPair | None = None
    is_whole: bool = False
    problem: str | None = None


@dataclass(frozen=True)
class Peers:
    """A pair's own task vector, and its peers: those after it in the order of keys, then those before it."""

    own: WeightPair
    others: tuple[Peer, ...] = ()

    @property
    def name(self) -> str:
        """No corpus was read."""
        return ""

    @property
    def content_hash(self) -> str:
        """Of which peers there were and what was in them."""
        return short_hash([[str(peer.pair), peer.relation, peer.revision] for peer in self.others])


def peers_of(pair: Pair, registry: Registry) -> Peers:
    """Every other registered finetune of the pair's base; the base itself, registered as a null, is none.

    Raises:
        RegistryError: no such pair.
        ModelLoadError: the pair's own weights do not exist or cannot be reached.
    """
    own = WeightPair.of(pair, registry)
    entry = registry.model(pair.model)
    base = WeightSide(
        fetch(registry.resolve(entry.source, pair.model), remote_code=entry.trust_remote_code).folder,
        (fetch(registry.resolve(entry.adapter, pair.model)).folder,) if entry.adapter else (),
        remote_code=entry.trust_remote_code,
    )
    tuned = own.tuned if registry.variant(pair).source else base
    own = replace(own, base=base, tuned=tuned)
    return Peers(own, tuple(_peers(pair, own, registry)))


def _peers(pair: Pair, own: WeightPair, registry: Registry) -> Iterator[Peer]:
    keys = registry.pairs(pair.model)
    place = keys.index(pair)
    for other in (*keys[place + 1 :], *keys[:place]):
        variant = registry.variant(other)
        if variant.source is None:
            continue
        peer = Peer(other, _relation(pair, other, registry))
        try:
            source = registry.resolve(variant.source, other.model)
            if not is_on_disk(source):
                raise ModelLoadError(f"{variant.source} is not on this machine; it is compared when it is diffed itself")
            found = fetch(source, remote_code=variant.trust_remote_code)
            side = own.base.plus(found.folder)
            weights = replace(own, tuned=WeightSide(found.folder) if variant.kind == "full" else side)
            is_whole = variant.kind == "full" or not is_switchable(found.folder)
            yield replace(peer, revision=found.revision, weights=weights, is_whole=is_whole)
        except DiffingError as error:
            logger.warning("%s is no peer of %s: %s", other, pair, error)
            yield replace(peer, problem=f"{type(error).__name__}: {error}")


def _relation(pair: Pair, other: Pair, registry: Registry) -> Relation:
    if other.organism == pair.organism:
        return "variant"
    if _compared_with(registry.variant(other)) in _sources(pair, registry):
        return "twin"
    return "original" if _compared_with(registry.variant(pair)) in _sources(other, registry) else "other"


def _sources(pair: Pair, registry: Registry) -> list[Source]:
    """Where the variants of a pair's organism lie."""
    variants = registry.organism(pair.organism).variants[pair.model].values()
    return [variant.source for variant in variants if variant.source]


def _compared_with(variant: Variant) -> Source | None:
    return variant.against.source if variant.against else None
