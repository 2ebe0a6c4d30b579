"""Changes of weights, weighed, cut to a rank and added up: one tensor at a time, never two models in memory.

    edited change of a tensor = Σ over finetunes of  w(block, part) · turn(cut(ΔW)),        ΔW = W_tuned − W_base
    leading k directions = U_k (U_kᵀ ΔW),    kept as  B' = U_k √S,  A' = √S V_kᵀ        rest = ΔW − leading

Changes of low rank stay factors, and their sum is exact: [w₁B₁, w₂B₂] and [A₁; A₂]. A change that is no matrix (norms,
biases) has no directions: a cut to rank k leaves it out, and the rest holds all of it.

Suffixes: M rows (outputs), N columns (inputs), R rank, K directions kept.
Reference: Ilharco et al. 2023 (task arithmetic); Hu et al. 2021 (LoRA).
"""

import heapq
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from diffing_core.errors import NotComputableError
from diffing_core.lazy import torch
from diffing_core.spectra import Factors, Spectrum, of_dense
from diffing_core.tensor_names import EMBEDDINGS, Part, model_order, place_of
from diffing_core.weight_edits.specification import LayerAmplification, resolve
from diffing_core.weight_edits.turning import turned
from diffing_core.weight_files import OpenSide, WeightSide
from diffing_core.weights import OpenPair, TensorDelta, WeightPair

EXACT_SIDE = 1024
ROUNDING = 1e-5  # of a change: what is left of it beyond its rank is noise of float32
_SEED = 0


@dataclass(frozen=True)
class Term:
    """One finetune's change, and what is done to it; the fields are those of the specification's adapters."""

    pair: WeightPair
    amplifications: tuple[LayerAmplification, ...] = ()
    rank: int | None = None
    residual: bool = False
    keep_norm: bool = False
    turn_seed: int | None = None


@dataclass(frozen=True, eq=False)
class EditedTensor:
    """What is added to one tensor of the base, or to one of the experts that it stacks, of its shape, oriented as y = W x.

    Factors or, where there are none, the whole change.
    `heads_too`: it changes an embedding that is also the head.
    """

    name: str
    layer: int | None
    part: Part
    expert: int | None = None
    flipped: bool = False
    factors: Factors | None = None
    change: Any = None
    heads_too: bool = False

    def dense(self) -> Any:
        """The change, [M, N], float32."""
        return self.change if self.factors is None else self.factors.dense()


def registered_base(pair: WeightPair) -> WeightSide:
    """The base model of the registry, without the adapter of a seed twin that a pair may have as its base side."""
    return replace(pair.base, adapters=pair.base.adapters[: 1 if pair.entry.adapter else 0])


def terms_on_registered_base(terms: Sequence[Term]) -> tuple[Term, ...]:
    """The terms, and before them the adapter that makes the first one's base side from the registered base, if any does."""
    first = terms[0].pair
    base = registered_base(first)
    if base == first.base:
        return tuple(terms)
    return Term(replace(first, base=base, tuned=first.base)), *terms


def n_layers(side: WeightSide) -> int:
    """Blocks of a model on disk."""
    numbers = [place_of(name)[0] for name in OpenSide(side).checkpoint.names()]
    return 1 + max((number for number in numbers if number is not None), default=-1)


def edited_tensors(terms: Sequence[Term]) -> Iterator[EditedTensor]:
    """The sums of all terms' changes in the order of the model, without tensors that do not change.

    Raises:
        NotComputableError: finetunes of different bases.
        RegistryError: a block that the model does not have.
    """
    folders = {term.pair.base.folder for term in terms}
    if len(folders) != 1:
        raise NotComputableError(f"changes of different bases cannot be added: {sorted(map(str, folders))}; name one model")
    streams = (_weighed(term) for term in terms)
    in_order = heapq.merge(*streams, key=lambda each: (model_order(each.name), each.expert or 0))
    for _, same in itertools.groupby(in_order, key=lambda each: (each.name, each.expert)):
        yield _sum(list(same))


def left_out(terms: Sequence[Term]) -> list[str]:
    """What the finetunes have and an edited model has not, since the base has no place for it; in words, as a tensor each."""
    found: dict[str, None] = {}
    for term in terms:
        weights = resolve(term.amplifications, n_layers(term.pair.base))
        for name, what in OpenPair(term.pair).without_place():
            layer, part, _ = place_of(name)
            if weights.of(layer, part):
                found[f"{name}: {what}"] = None
    return list(found)


def norm(change: "Factors | Any") -> float:
    """‖·‖_F of a change; of factors by two R×R products."""
    if not isinstance(change, Factors):
        return torch.linalg.vector_norm(change, dtype=torch.float64).item()
    left_RR, right_RR = change.left_MR.T @ change.left_MR, change.right_RN @ change.right_RN.T
    return max((left_RR.double() * right_RR.double()).sum().item(), 0.0) ** 0.5


def leading(change: "Factors | Any", n_directions: int) -> Factors:
    """The leading directions of a change [M, N], both factors √S long; fewer where its rank is lower."""
    spectrum = spectrum_of(change, n_directions)
    sigma_K = spectrum.sigma_K[:n_directions].float()
    left_MK = spectrum.left_MK[:, :n_directions]
    right_KN = (left_MK.T @ change.left_MR) @ change.right_RN if isinstance(change, Factors) else left_MK.T @ change
    return Factors(left_MK * sigma_K.sqrt(), right_KN / sigma_K.sqrt()[:, None])


def spectrum_of(change: "Factors | Any", n_leading: int) -> Spectrum:
    """Singular values and left directions; of large dense changes the leading ones, by a randomised range finder."""
    if isinstance(change, Factors):
        return change.spectrum()
    generator = torch.Generator().manual_seed(_SEED)
    return of_dense(change, exact_side=EXACT_SIDE, n_leading=n_leading, generator=generator)


def change_of(delta: TensorDelta) -> "Factors | Any":
    """The change of one tensor as it is known: factors or a whole tensor."""
    return delta.factors if delta.factors is not None else delta.pair.tuned - delta.pair.base


def _weighed(term: Term) -> Iterator[EditedTensor]:
    head_follows = _head_follows(term.pair)
    for delta, weight in weighed_deltas(term):
        change = _cut(change_of(delta), term)
        if change is None or _is_nothing(change):
            continue
        if term.turn_seed is not None:
            change = turned(change, term.turn_seed, delta.name, delta.expert)
        scaled = _scaled(_on_all_rows(change, delta), weight)
        heads_too = head_follows and delta.pair is not None and delta.name in EMBEDDINGS
        given = {"factors": scaled} if isinstance(change, Factors) else {"change": scaled}
        yield EditedTensor(delta.name, delta.layer, delta.part, delta.expert, delta.flipped, heads_too=heads_too, **given)


def _on_all_rows(change: "Factors | Any", delta: TensorDelta) -> "Factors | Any":
    """The change with zeros for rows of the base that a finetune with a smaller vocabulary lacks."""
    if delta.pair is None or delta.pair.only_base is None:
        return change
    rows_MR = change.left_MR if isinstance(change, Factors) else change
    padded_MR = torch.cat([rows_MR, rows_MR.new_zeros(len(delta.pair.only_base), *rows_MR.shape[1:])])
    return replace(change, left_MR=padded_MR) if isinstance(change, Factors) else padded_MR


def weighed_names(term: Term, opened: OpenPair) -> Iterator[tuple[str, float]]:
    """Names of tensors that may change, with the weight of their change, none of weight 0."""
    weights = resolve(term.amplifications, n_layers(term.pair.base))
    for name in opened.names:
        layer, part, _ = place_of(name)
        if weight := weights.of(layer, part):
            yield name, weight


def weighed_deltas(term: Term) -> Iterator[tuple[TensorDelta, float]]:
    """Their changes; what has weight 0 is not read."""
    opened = OpenPair(term.pair)
    for name, weight in weighed_names(term, opened):
        for delta in opened.deltas(name):
            yield delta, weight


def _head_follows(pair: WeightPair) -> bool:
    """Whether the head changes with the embedding: in a tied checkpoint, not with an adapter unless it says so."""
    base, tuned = OpenSide(pair.base), OpenSide(pair.tuned)
    own = pair.tuned.folder != pair.base.folder
    tying = any(adapter.config.get("ensure_weight_tying") for adapter in tuned.adapters.values())
    return base.checkpoint.tied and tuned.checkpoint.tied and (own or tying)


def _is_nothing(change: "Factors | Any") -> bool:
    """Whether a change is zero or has no direction at all."""
    return not (change.left_MR.any() if isinstance(change, Factors) else change.any())


def _cut(change: "Factors | Any", term: Term) -> "Factors | Any | None":
    """The part of a change that a term keeps; None if that is nothing."""
    if term.rank is None:
        return change
    if not isinstance(change, Factors) and (change.ndim != 2 or not change.any()):
        return change if term.residual else None
    kept = leading(change, term.rank)
    if term.residual:
        kept = _rest(change, kept)
        if norm(kept) <= ROUNDING * norm(change):
            return None
    if not term.keep_norm:
        return kept
    sizes = [norm(each) for each in (kept, change)]
    return _scaled(kept, sizes[1] / sizes[0]) if sizes[0] else kept


def _rest(change: "Factors | Any", kept: Factors) -> "Factors | Any":
    if not isinstance(change, Factors):
        return change - kept.dense()
    basis_MK = torch.nn.functional.normalize(kept.left_MR, dim=0)
    return replace(change, left_MR=change.left_MR - basis_MK @ (basis_MK.T @ change.left_MR))


def _scaled(change: "Factors | Any", by: float) -> "Factors | Any":
    return replace(change, left_MR=change.left_MR * by) if isinstance(change, Factors) else change * by


def _sum(parts: list[EditedTensor]) -> EditedTensor:
    first = replace(parts[0], heads_too=any(each.heads_too for each in parts))
    if len(parts) == 1:
        return first
    if all(each.factors is not None for each in parts):
        return replace(first, factors=_stacked(each.factors for each in parts))
    return replace(first, factors=None, change=sum(each.dense() for each in parts))


def _stacked(terms: Iterable[Factors]) -> Factors:
    terms = list(terms)
    return Factors(torch.cat([each.left_MR for each in terms], 1), torch.cat([each.right_RN for each in terms]))
