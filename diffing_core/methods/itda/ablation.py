"""What new atoms do: KL(tuned ‖ base) when the tuned model runs without them, from one layer on.

    omitted        h ← h − Σ over the ablated of C_j ‖h‖ a_j
    turned_back    h ← h − Σ over the ablated of C_j ‖h‖ (v_j − w_j) / ‖u_j‖
    removed        1 − Σ KL(ablated ‖ base) / Σ KL(tuned ‖ base)

v_j and w_j are the tuned model's and the base's vector of the atom's token, u_j the one that the atom is. An atom is a whole
vector, so that omitting it takes away what both models share, too, and may well raise the KL; turning it back takes away what
tuning did to its token, as a swap of decoders does in a crosscoder. As many random base atoms are treated alike for comparison.
Only tokens that were encoded as held-out ones are edited: none before `first_position`, special, or of outlying norm.
Intervals: texts are drawn again, all ablations on the same draws.

Shapes: B sequences, T positions, N tokens, D width, I atoms, S texts, R draws.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from diffing_core.corpus import TokenBatch
from diffing_core.fit_reading import FitReading
from diffing_core.interventions import edited_residual
from diffing_core.itda_dictionary import Staged, unit
from diffing_core.lazy import torch
from diffing_core.methods.itda.material import Material, places, turned_ID
from diffing_core.methods.itda.settings import ItdaSettings
from diffing_core.progress import Advance, track
from diffing_core.pursuit import Code

TOKENS_PER_BATCH = 512
WAYS = ("omitted", "turned_back")
Taken = Callable[[int, np.ndarray, Any], Any]


def _unwatched(_n_batches: int, **_measures: float) -> None:
    """For who shows no progress."""


class Effect(NamedTuple):
    """One ablation and each text's summed KL [S] with it."""

    ablated: str
    how: str
    n_atoms: int
    kl_S: np.ndarray


class Behaviour:
    """Summed KL(tuned ‖ base) of some texts. Of the base its states after the final norm are kept, never its logits.

    Attributes:
        kl_S: nats of the tuned model as it is, summed over the tokens of each text that methods see.
        n_batches: forwards that one reading of all texts takes.
    """

    def __init__(self, reading: FitReading, documents: Sequence[int]) -> None:
        self._context = reading.context
        corpus = reading.context.corpus
        self._document_S = np.asarray(documents, np.int64)
        self._first = corpus.first_seen_S[list(documents)]
        self._some = replace(corpus, sequences=tuple(corpus.sequences[document] for document in documents))
        self.n_tokens = int((np.asarray([len(each) for each in self._some.sequences]) - self._first).sum())
        self._base = [self._normed_BTD("base", batch) for batch in self._batches()]
        self.n_batches = len(self._base)
        self.kl_S = self._kl(_unwatched)

    def kl_without(self, layer: int, taken: Taken, advance: Advance = _unwatched) -> np.ndarray:
        """The same KL [S] when something is taken off the residual stream at a layer.

        Args:
            layer: whose output is changed.
            taken: of a batch's number, places int64 [B, T] (see `Material.place_N`) and tuned states [B, T, D] what is taken off.
            advance: told of each batch.
        """
        batches = enumerate(self._batches())

        def edit(hidden_BTD: Any) -> Any:
            number, batch = next(batches)
            return hidden_BTD - taken(number, self._place_BT(batch), hidden_BTD).to(hidden_BTD.dtype)

        with edited_residual(self._context.tuned, layer, edit):
            return self._kl(advance)

    def _place_BT(self, batch: TokenBatch) -> np.ndarray:
        return places(self._document_S[list(batch.sequences), None], np.arange(batch.token_BT.shape[1]))

    def _kl(self, advance: Advance) -> np.ndarray:
        total_S = np.zeros(len(self._some.sequences))
        for batch, base_BTD in zip(self._batches(), self._base, strict=True):
            tuned_BTV = self._logprob_BTV("tuned", self._normed_BTD("tuned", batch))
            base_BTV = self._logprob_BTV("base", base_BTD)
            kl_BT = torch.linalg.vecdot(tuned_BTV.exp(), tuned_BTV - base_BTV).cpu().double().numpy()
            seen_BT = batch.mask_BT & (np.arange(batch.mask_BT.shape[1]) >= self._first[list(batch.sequences), None])
            total_S[list(batch.sequences)] = (kl_BT * seen_BT).sum(1)
            advance(1)
        return np.maximum(total_S, 0.0)

    def _batches(self) -> Iterator[TokenBatch]:
        yield from self._some.batches(TOKENS_PER_BATCH)

    def _normed_BTD(self, side: str, batch: TokenBatch) -> Any:
        subject = getattr(self._context, side)
        return subject.backbone(*(torch.from_numpy(each).to(subject.device) for each in (batch.token_BT, batch.mask_BT)))

    def _logprob_BTV(self, side: str, normed_BTD: Any) -> Any:
        logits_BTV = getattr(self._context, side).logits(normed_BTD)[..., : self._context.vocab_size]
        return logits_BTV.float().log_softmax(-1)


class _Encoded(NamedTuple):
    """Code of a batch's tokens, their lengths ‖h‖ [N, 1], and which of them are edited, bool [N, 1]."""

    code: Code
    norm_N1: Any
    edited_N1: Any


class Ablation:
    """Takes atoms of one layer's dictionary out of the residual stream.

    Only tokens of `held_out` are edited: others were never encoded, and their vectors are none that the dictionary is for.
    A batch is encoded when the model first comes to it; what the model does below the layer is the same every time.
    """

    def __init__(self, found: Staged, material: Material, held_out: Material, settings: ItdaSettings) -> None:
        self._found, self._settings, self._place_N = found, settings, held_out.place_N
        self._encoded: dict[int, _Encoded] = {}
        self._removed_ID = {"omitted": found.whole.atom_ID, "turned_back": turned_ID(found, material)}

    def effects(self, behaviour: Behaviour, layer: int) -> list[Effect]:
        """New atoms and as many random base atoms, in all ways; none where there is no new atom."""
        new_I = self._found.new_I
        if not len(new_I):
            return []
        n_random = min(len(new_I), self._found.n_base)
        random_I = np.random.default_rng(self._settings.seed).choice(self._found.n_base, n_random, replace=False)
        cases = [(name, atoms, how) for name, atoms in (("new", new_I), ("random", random_I)) for how in WAYS]
        with track(len(cases) * behaviour.n_batches, "batches", f"itda ablation at layer {layer}") as advance:
            return [
                Effect(name, how, len(atoms), behaviour.kl_without(layer, partial(self.taken, atoms, how), advance))
                for name, atoms, how in cases
            ]

    def taken(self, atoms: np.ndarray, how: str, number: int, place_BT: np.ndarray, hidden_BTD: Any) -> Any:
        """What these atoms' ablation takes off a batch, [B, T, D]: C_j ‖h‖ of each, times what it stands for."""
        if number not in self._encoded:
            self._encoded[number] = self._of_batch(place_BT, hidden_BTD)
        code, norm_N1, edited_N1 = self._encoded[number]
        part_NA = code.columns(len(self._found.whole), atoms) * norm_N1 * edited_N1
        return (part_NA @ self._removed_ID[how][atoms]).view(hidden_BTD.shape).to(hidden_BTD.device)

    def _of_batch(self, place_BT: np.ndarray, hidden_BTD: Any) -> _Encoded:
        atom_ID = self._found.whole.atom_ID
        vector_ND = hidden_BTD.flatten(0, 1).to(atom_ID.device).float()
        code = self._settings.encoder.encode(unit(vector_ND), atom_ID)
        edited_N1 = torch.from_numpy(np.isin(place_BT, self._place_N).reshape(-1, 1)).to(vector_ND.device)
        return _Encoded(code, vector_ND.norm(dim=1, keepdim=True), edited_N1)


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
