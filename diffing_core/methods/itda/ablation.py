"""What new atoms do: KL(tuned ‖ base) when the tuned model runs without them, from one layer on.

    omitted        h ← h − Σ over the ablated of C_j ‖h‖ a_j
    turned_back    h ← h − Σ over the ablated of C_j ‖h‖ (v_j − w_j) / ‖u_j‖
    removed        1 − Σ KL(ablated ‖ base) / Σ KL(tuned ‖ base)

v_j and w_j are the tuned model's and the base's vector of the atom's token, u_j the one that the atom is. An atom is a whole
vector, so that omitting it takes away what both models share, too, and may well raise the KL; turning it back takes away what
tuning did to its token, as a swap of decoders does in a crosscoder. As many random base atoms are treated alike for comparison.
Intervals: texts are drawn again, all ablations on the same draws.

Shapes: B sequences, T positions, N tokens, D width, I atoms, S texts, R draws.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from diffing_core.corpus import TokenBatch
from diffing_core.fit_reading import FitReading
from diffing_core.interventions import edited_residual
from diffing_core.itda_dictionary import Staged, unit
from diffing_core.lazy import torch
from diffing_core.methods.itda.material import Material, turned_ID
from diffing_core.methods.itda.settings import ItdaSettings

TOKENS_PER_BATCH = 512
WAYS = ("omitted", "turned_back")


class Effect(NamedTuple):
    """One ablation and each text's summed KL [S] with it."""

    ablated: str
    how: str
    n_atoms: int
    kl_S: np.ndarray


class Behaviour:
    """Summed KL(tuned ‖ base) of some texts, and the tuned model's residual stream at some layers.

    Attributes:
        kl_S: nats of the tuned model as it is, summed over the tokens of each text that methods see.
        states: layer -> one tensor [B, T, D] per batch.
    """

    def __init__(self, reading: FitReading, documents: Sequence[int], layers: Sequence[int]) -> None:
        self._context = reading.context
        corpus = reading.context.corpus
        self._first = corpus.first_seen_S[list(documents)]
        self._some = replace(corpus, sequences=tuple(corpus.sequences[document] for document in documents))
        self.n_tokens = int((np.asarray([len(each) for each in self._some.sequences]) - self._first).sum())
        self._base = [self._logprob_BTV("base", batch) for batch in self._batches()]
        self.states: dict[int, list[Any]] = {layer: [] for layer in layers}
        with ExitStack() as stack:
            for layer in layers:
                stack.enter_context(edited_residual(reading.context.tuned, layer, self._keep(layer)))
            self.kl_S = self._kl()

    def kl_without(self, layer: int, taken: Sequence[Any]) -> np.ndarray:
        """The same KL [S] when this is taken off the residual stream at a layer, one tensor [B, T, D] per batch."""
        left = iter(taken)
        with edited_residual(self._context.tuned, layer, lambda hidden_BTD: hidden_BTD - next(left).to(hidden_BTD.dtype)):
            return self._kl()

    def _keep(self, layer: int) -> Any:
        def keep(hidden_BTD: Any) -> Any:
            self.states[layer].append(hidden_BTD)
            return hidden_BTD

        return keep

    def _kl(self) -> np.ndarray:
        total_S = np.zeros(len(self._some.sequences))
        for batch, base_BTV in zip(self._batches(), self._base, strict=True):
            tuned_BTV = self._logprob_BTV("tuned", batch)
            kl_BT = torch.linalg.vecdot(tuned_BTV.exp(), tuned_BTV - base_BTV).double().cpu().numpy()
            seen_BT = batch.mask_BT & (np.arange(batch.mask_BT.shape[1]) >= self._first[list(batch.sequences), None])
            total_S[list(batch.sequences)] = (kl_BT * seen_BT).sum(1)
        return np.maximum(total_S, 0.0)

    def _batches(self) -> Iterator[TokenBatch]:
        yield from self._some.batches(TOKENS_PER_BATCH)

    def _logprob_BTV(self, side: str, batch: TokenBatch) -> Any:
        subject = getattr(self._context, side)
        token_BT, mask_BT = (torch.from_numpy(each).to(subject.device) for each in (batch.token_BT, batch.mask_BT))
        logits_BTV = subject.logits(subject.backbone(token_BT, mask_BT))[..., : self._context.vocab_size]
        return logits_BTV.float().log_softmax(-1)


class Ablation:
    """Takes atoms of one layer's dictionary out of the residual stream; tokens before `first_position` stay as they are."""

    def __init__(self, found: Staged, material: Material, settings: ItdaSettings) -> None:
        self._found, self._settings = found, settings
        self._removed_ID = {"omitted": found.whole.atom_ID, "turned_back": turned_ID(found, material)}

    def effects(self, behaviour: Behaviour, layer: int) -> list[Effect]:
        """New atoms and as many random base atoms, in all ways; none where there is no new atom."""
        new_I = self._found.new_I
        if not len(new_I):
            return []
        n_random = min(len(new_I), self._found.n_base)
        random_I = np.random.default_rng(self._settings.seed).choice(self._found.n_base, n_random, replace=False)
        parts = [self.contributions(hidden_BTD) for hidden_BTD in behaviour.states[layer]]
        return [
            Effect(name, how, len(atoms), behaviour.kl_without(layer, [self.taken(part_BTI, atoms, how) for part_BTI in parts]))
            for name, atoms in (("new", new_I), ("random", random_I))
            for how in WAYS
        ]

    def contributions(self, hidden_BTD: Any) -> Any:
        """C_j ‖h‖ of every atom at every token, [B, T, I]."""
        atom_ID = self._found.whole.atom_ID
        vector_ND = hidden_BTD.flatten(0, 1).float()
        part_NI = self._settings.encoder.encode(unit(vector_ND), atom_ID).dense(len(atom_ID)) * vector_ND.norm(dim=1, keepdim=True)
        part_BTI = part_NI.view(*hidden_BTD.shape[:2], -1)
        part_BTI[:, : self._settings.first_position] = 0
        return part_BTI

    def taken(self, part_BTI: Any, atoms: np.ndarray, how: str) -> Any:
        """What these atoms' ablation takes off, [B, T, D]."""
        return part_BTI[..., atoms] @ self._removed_ID[how][atoms]


def ablation_rows(effects: Sequence[Effect], behaviour: Behaviour, settings: ItdaSettings) -> list[dict[str, Any]]:
    """Rows of `itda_ablations` without the layer; none where the models do not differ on these texts."""
    if not behaviour.kl_S.any():
        return []
    n_documents = len(behaviour.kl_S)
    draw_RS = np.random.default_rng(settings.seed).integers(n_documents, size=(settings.resamples, n_documents))
    random = {each.how: each for each in effects if each.ablated == "random"}
    rows = []
    for each in effects:
        removed, low, high = _with_interval(each.kl_S, behaviour.kl_S, draw_RS)
        beyond, beyond_low, beyond_high = _with_interval(each.kl_S - random[each.how].kl_S, behaviour.kl_S, draw_RS, whole=0.0)
        rows.append(
            {
                "ablated": each.ablated,
                "how": each.how,
                "n_atoms": each.n_atoms,
                "n_documents": n_documents,
                "kl_nats": behaviour.kl_S.sum() / behaviour.n_tokens,
                "ablated_kl_nats": each.kl_S.sum() / behaviour.n_tokens,
                "removed": removed,
                "removed_low": low,
                "removed_high": high,
                "beyond_random": beyond,
                "beyond_random_low": beyond_low,
                "beyond_random_high": beyond_high,
            }
        )
    return rows


def _with_interval(part_S: np.ndarray, total_S: np.ndarray, draw_RS: np.ndarray, whole: float = 1.0) -> tuple[float, float, float]:
    """whole − Σ part / Σ total with its 95 % bootstrap interval; draws of texts that do not differ count as 0."""
    total_R = total_S[draw_RS].sum(1)
    drawn_R = whole - np.divide(part_S[draw_RS].sum(1), total_R, out=np.full(len(total_R), whole), where=total_R > 0)
    low, high = np.quantile(drawn_R, [0.025, 0.975])
    return float(whole - part_S.sum() / total_S.sum()), float(low), float(high)
