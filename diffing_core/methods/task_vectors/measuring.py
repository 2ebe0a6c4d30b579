"""The run of `task_vectors`: the pair's tensors and all peers' in one walk in the order of the model.

All walk the same names, so that a tensor of the base is read once for all of them, and beside it and the pair's own one
tensor of one peer is in memory, however many peers there are. A peer whose files turn out to be damaged ends alone.

Cost of one run over n peers that are whole checkpoints: n + 1 checkpoints and the base are read through, and of every
matrix in a block the leading directions are found; n runs read n² checkpoints. Adapters cost their own few megabytes.

Suffixes: M rows (outputs), K directions, D model width.
"""

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pyarrow as pa
from safetensors import SafetensorError

from diffing_core.errors import DiffingError
from diffing_core.lazy import torch
from diffing_core.methods.base import Inputs, Need, Tables
from diffing_core.methods.task_vectors.declaration import MODULES, PARTS, PEERS, VOCABULARY, TaskVectorsSettings
from diffing_core.methods.task_vectors.likeness import Likeness
from diffing_core.methods.task_vectors.task_tensor import Space, TaskTensor
from diffing_core.methods.weight_diff.change import Change
from diffing_core.methods.weight_diff.declaration import WeightDiffSettings
from diffing_core.methods.weight_diff.directions import Written, read_directions
from diffing_core.peers import Peer, Peers
from diffing_core.tables import TableSpec
from diffing_core.tensor_names import WRITERS, model_order, module_of, place_of
from diffing_core.weights import OpenPair, TensorDelta, WeightPair, weight_stream

Place = tuple[int | None, str]
UNREADABLE = (DiffingError, OSError, ValueError, SafetensorError)
logger = logging.getLogger(__name__)


def run(inputs: Inputs, settings: TaskVectorsSettings) -> Tables:
    """The four tables of one pair. No peers: nothing is like it, and nothing is taken out of what it writes."""
    peers: Peers = inputs[Need.PEERS]
    pair: WeightPair = inputs[Need.WEIGHTS]
    compared = [_Compared(peer, settings) for peer in _affordable(peers.others, settings.whole_peers)]
    distinct = _Distinct(settings)
    shared: dict[tuple[str, int | None], tuple[Any, int]] = {}
    own = OpenPair(peers.own)
    own_names = set(own.names)
    for peer in compared:
        peer.open(own)
    for name in sorted(own_names.union(*(peer.names for peer in compared)), key=model_order):
        for expert in _experts(name, own if name in own_names else None, compared):
            delta = own.delta(name, expert) if name in own_names else None
            spaces = _compare((name, expert), delta, compared, settings)
            if delta is not None and _writes(delta):
                shared[name, expert] = _shared(spaces, delta.shape[0], settings.shared_energy)
                if pair == peers.own:
                    distinct.add(delta, *shared[name, expert])
    if pair != peers.own:
        for delta in filter(_writes, weight_stream(pair)):
            distinct.add(delta, *shared.get((delta.name, delta.expert), (torch.zeros(delta.shape[0], 0), 0)))
    return {
        PEERS.name: _table(PEERS, [each.row() for each in compared]),
        PARTS.name: _table(PARTS, [row for each in compared for row in each.part_rows()]),
        MODULES.name: _table(MODULES, distinct.rows),
        VOCABULARY.name: _table(VOCABULARY, distinct.tokens(pair)),
    }


def _affordable(peers: Sequence[Peer], n_whole: int | None) -> Iterator[Peer]:
    """All peers; whole checkpoints beyond `n_whole` without weights, and with the reason."""
    if n_whole is None:
        yield from peers
        return
    for peer in peers:
        n_whole -= peer.is_whole
        if peer.is_whole and n_whole < 0:
            problem = "not compared: more whole checkpoints than the setting whole_peers admits"
            peer = replace(peer, weights=None, problem=problem)
        yield peer


class _Compared:
    """One peer: its tensors, asked in the order of the model, and the sums of both."""

    def __init__(self, peer: Peer, settings: TaskVectorsSettings) -> None:
        self.peer = peer
        self.problem = peer.problem
        self.names: frozenset[str] = frozenset()
        self.parts: dict[Place, Likeness] = defaultdict(Likeness)
        self._settings = settings
        self._opened: OpenPair | None = None

    @property
    def shares(self) -> bool:
        """Whether what it writes counts as shared: a variant, a twin and its original learnt the very same."""
        return self.peer.relation == "other"

    def experts(self, name: str) -> Sequence[int | None]:
        """As `OpenPair.experts`, of a name that it has."""
        return self._opened.experts(name)

    def open(self, own: OpenPair) -> None:
        """Opens its files, beside those of the pair's own task vector."""
        if self.peer.weights is None:
            return
        with self._ending_alone():
            self._opened = OpenPair(self.peer.weights, own)
            self.names = frozenset(self._opened.names)

    def meet(self, key: tuple[str, int | None], own: TaskTensor | None, own_space: Space | None) -> Space | None:
        """Compares the pair's tensor, or expert, with the peer's own, where both have one, and returns the space of that.

        What only one of them changes counts in its length; rows of the vocabulary that only one of them has do not.
        """
        name, expert = key
        sums = self.parts[place_of(name)[:2]] if own is not None or name in self.names else None
        tensor = None
        if name in self.names:
            with self._ending_alone():
                tensor = TaskTensor.of(self._opened.delta(name, expert))
        if own is not None and tensor is not None:
            own, tensor = own.common_rows(tensor), tensor.common_rows(own)
        if own is not None:
            sums.own += own.squared()
        if tensor is None:
            return None
        sums.peer += tensor.squared()
        if own is None or tensor.shape != own.shape:
            return None
        space = tensor.space(self._settings.overlap_rank, self._settings.seed) if own_space else None
        sums.add_pair(own, tensor, (own_space, space) if own_space and space else None)
        return space

    @contextmanager
    def _ending_alone(self) -> Iterator[None]:
        """Files that cannot be read end this peer, and none but it."""
        try:
            yield
        except UNREADABLE as error:
            logger.warning("peer %s cannot be read: %s", self.peer.pair, error)
            self.problem, self.names = f"{type(error).__name__}: {error}", frozenset()

    def row(self) -> dict[str, Any]:
        """The peer as a whole."""
        known = {"relation": self.peer.relation, "peer_revision": self.peer.revision, "problem": self.problem}
        if self.problem is None:
            return self._key() | known | sum(self.parts.values(), Likeness()).row()
        return self._key() | known | dict.fromkeys(Likeness().row()) | {"n_tensors": 0, "overlap_rank": 0}

    def part_rows(self) -> list[dict[str, Any]]:
        """The same per block and part, in the order of the tensors."""
        if self.problem is not None:
            return []
        return [self._key() | {"layer": layer, "part": part} | sums.row() for (layer, part), sums in self.parts.items()]

    def _key(self) -> dict[str, str]:
        return {"peer_organism": self.peer.pair.organism, "peer_variant": self.peer.pair.variant}


class _Distinct:
    """What the pair writes into the residual stream outside of what its peers share."""

    def __init__(self, settings: TaskVectorsSettings) -> None:
        self.rows: list[dict[str, Any]] = []
        self._written: list[Written] = []
        self._settings = settings

    def add(self, delta: TensorDelta, basis_MK: Any, n_peers: int) -> None:
        """One module; unchanged ones are left out."""
        tensor = TaskTensor.of(delta)
        whole = tensor.squared()
        if not whole:
            return
        rest = tensor.outside(basis_MK)
        n_shared = basis_MK.shape[1]
        self.rows.append(
            {
                "name": delta.name,
                "expert": delta.expert,
                "layer": delta.layer,
                "part": delta.part,
                "projection": delta.projection,
                "module": module_of(delta.name),
                "n_peers": n_peers,
                "n_shared": n_shared,
                "frobenius": whole**0.5,
                "distinctive_share": rest.squared() / whole,
                "expected_share": 1 - n_shared / delta.shape[0],
            }
        )
        k = self._settings.directions
        found = rest.spectrum(k, self._settings.seed)
        if len(found.sigma_K):
            low_rank = delta.factors is not None
            left_over = replace(delta, factors=rest.change) if low_rank else delta
            change = Change(left_over, delta.load_base(), None if low_rank else rest.change, found)
            sizes = (found.sigma_K[:k], found.energy_shares_K[:k], change.gain(k))
            self._written.append(Written(delta.name, delta.expert, delta.layer, delta.part, found.left_MK[:, :k].T.clone(), *sizes))

    def tokens(self, pair: WeightPair) -> list[dict[str, Any]]:
        """Tokens by how far the rest writes towards or away from them."""
        return read_directions(pair, self._written, WeightDiffSettings(top_tokens=self._settings.top_tokens))[1]


def _experts(name: str, own: OpenPair | None, compared: list[_Compared]) -> Sequence[int | None]:
    """The experts that a tensor stacks, known from whoever changes it: all have the base's shape."""
    owner = own or next((peer for peer in compared if name in peer.names), None)
    return owner.experts(name) if owner else ()


def _compare(
    key: tuple[str, int | None], delta: TensorDelta | None, compared: list[_Compared], settings: TaskVectorsSettings
) -> list[Space]:
    """Compares one tensor, or expert, with all peers; gives the spaces of those whose directions count as shared."""
    own = TaskTensor.of(delta) if delta is not None else None
    is_matrix = own is not None and len(own.shape) == 2 and delta.layer is not None
    space = own.space(settings.overlap_rank, settings.seed) if is_matrix and compared else None
    spaces = [(peer, peer.meet(key, own, space)) for peer in compared]
    return [found for peer, found in spaces if peer.shares and found is not None]


def _shared(spaces: list[Space], n_rows: int, energy: float) -> tuple[Any, int]:
    """(leading common output directions [M, K], number of peers): least K that hold `energy` of all peers' change.

    Every peer counts alike, whatever its size.
    """
    spaces = [space for space in spaces if len(space.sigma_K)]
    if not spaces or not energy:
        return torch.zeros(n_rows, 0), len(spaces)
    joined_MK = torch.cat([space.left_MK * (space.sigma_K / space.sigma_K.norm()) for space in spaces], 1)
    left_MK, sigma_K, _ = torch.linalg.svd(joined_MK, full_matrices=False)
    held_K = sigma_K.square().cumsum(0) / sigma_K.square().sum()
    return left_MK[:, : int((held_K < energy).sum()) + 1], len(spaces)


def _writes(delta: TensorDelta) -> bool:
    return delta.projection in WRITERS and delta.part in ("attn", "mlp") and len(delta.shape) == 2


def _table(spec: TableSpec, rows: list[Mapping[str, Any]]) -> pa.Table:
    return spec.table({name: [row[name] for row in rows] for name in spec.schema.names})
