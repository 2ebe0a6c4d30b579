"""What new atoms do: KL(tuned ‖ base) when the tuned model runs without them, from one layer on.

    re_expressed   h ← h − (ĥ − ĥ'), ĥ its code over all atoms, ĥ' over all but the ablated: what no atom says stays
    omitted        h ← h − Σ over the ablated of C_j ‖h‖ a_j
    removed        1 − Σ KL(ablated ‖ base) / Σ KL(tuned ‖ base)

An atom is a whole vector of a token, so that omitting one takes away what the models have in common, too; encoding anew does
not. As many random base atoms are left out for comparison. Intervals: texts are drawn again, both ablations on the same draws.

Shapes: B sequences, T positions, N tokens, D width, I atoms, S texts, R draws.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from diffing_core.corpus import TokenBatch
from diffing_core.fit_reading import FitReading
from diffing_core.interventions import edited_residual
from diffing_core.itda_dictionary import Staged, unit
from diffing_core.lazy import torch
from diffing_core.methods.itda.settings import ItdaSettings
from diffing_core.pursuit import Pursuit

TOKENS_PER_BATCH = 512
WAYS = ("re_expressed", "omitted")
Edit = Callable[[Any], Any]


class Effect(NamedTuple):
    """Of one ablation: texts' summed KL [S] without and with it, as the tuned model is."""

    ablated: str
    how: str
    n_atoms: int
    kl_S: np.ndarray


class Behaviour:
    """Summed KL(tuned ‖ base) of some texts, with the tuned model's stream edited or not."""

    def __init__(self, reading: FitReading, documents: Sequence[int]) -> None:
        self._context = reading.context
        corpus = reading.context.corpus
        self._first = corpus.first_seen_S[list(documents)]
        self._some = replace(corpus, sequences=tuple(corpus.sequences[document] for document in documents))
        self.n_tokens = int((np.asarray([len(each) for each in self._some.sequences]) - self._first).sum())
        with torch.inference_mode():
            self._base = [self._logprob_BTV("base", batch) for batch in self._batches()]
        self.kl_S = self.kl()

    def kl(self, layer: int | None = None, edit: Edit | None = None) -> np.ndarray:
        """Nats summed over the tokens of each text that methods see, float64 [S]."""
        total_S = np.zeros(len(self._some.sequences))
        around = nullcontext() if layer is None or edit is None else edited_residual(self._context.tuned, layer, edit)
        with torch.inference_mode(), around:
            for batch, base_BTV in zip(self._batches(), self._base, strict=True):
                tuned_BTV = self._logprob_BTV("tuned", batch)
                kl_BT = (tuned_BTV.exp() * (tuned_BTV - base_BTV)).sum(-1).double().cpu().numpy()
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
    """Edits that take atoms of one layer's dictionary out of the residual stream."""

    def __init__(self, found: Staged, encoder: Pursuit, first_position: int) -> None:
        self._found, self._encoder, self._first_position = found, encoder, first_position

    def effects(self, behaviour: Behaviour, layer: int, seed: int) -> list[Effect]:
        """New atoms and as many random base atoms, both ways; none where there is no new atom."""
        new_I = self._found.new_I
        n_random = min(len(new_I), self._found.n_base)
        random_I = np.random.default_rng(seed).choice(self._found.n_base, n_random, replace=False)
        return [
            Effect(name, how, len(atoms), behaviour.kl(layer, self.edit(atoms, how)))
            for name, atoms in (("new", new_I), ("random", np.sort(random_I)))
            for how in WAYS
            if len(new_I)
        ]

    def edit(self, atoms: np.ndarray, how: str) -> Edit:
        """The function for `edited_residual`; positions before `first_position` are left as they are."""
        change = self._re_expressed if how == "re_expressed" else self._omitted

        def edit(hidden_BTD: Any) -> Any:
            seen_BUD = hidden_BTD[:, self._first_position :]
            vector_ND = seen_BUD.flatten(0, 1).float()
            taken_ND = change(unit(vector_ND), atoms) * vector_ND.norm(dim=1, keepdim=True)
            edited_BTD = hidden_BTD.clone()
            edited_BTD[:, self._first_position :] = (vector_ND - taken_ND).view_as(seen_BUD).to(hidden_BTD.dtype)
            return edited_BTD

        return edit

    def _re_expressed(self, unit_ND: Any, atoms: np.ndarray) -> Any:
        """Only tokens whose code has such an atom are encoded anew: the others' codes would be the same."""
        atom_ID = self._found.whole.atom_ID
        code = self._encoder.encode(unit_ND, atom_ID)
        uses_N = torch.isin(code.atom_NK, torch.from_numpy(atoms).to(unit_ND.device)).any(1)
        kept = torch.from_numpy(np.setdiff1d(np.arange(len(atom_ID)), atoms)).to(unit_ND.device)
        taken_ND = torch.zeros_like(unit_ND)
        if uses_N.any():
            anew_ND = self._encoder.encode(unit_ND[uses_N], atom_ID[kept]).reconstruction(atom_ID[kept])
            taken_ND[uses_N] = code.reconstruction(atom_ID)[uses_N] - anew_ND
        return taken_ND

    def _omitted(self, unit_ND: Any, atoms: np.ndarray) -> Any:
        atom_ID = self._found.whole.atom_ID
        return self._encoder.encode(unit_ND, atom_ID).dense(len(atom_ID))[:, atoms] @ atom_ID[atoms]


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
