"""Rows of one layer's tables that need no model: sizes, passes, atoms, new atoms, tokens, examples.

Suffixes: N tokens, I atoms, A new atoms, T tokens of the vocabulary listed.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from diffing_core.activation_pairs import PairedRows
from diffing_core.itda_dictionary import unit
from diffing_core.methods.itda.layer_dictionary import LayerDictionary
from diffing_core.methods.itda.material import Material, turned_ID
from diffing_core.methods.itda.new_atoms import NewAtoms, ranked
from diffing_core.methods.itda.settings import ItdaSettings
from diffing_core.methods.itda.sources import Sources
from diffing_core.methods.itda.usage import Usage, mean_l0
from diffing_core.stats import clopper_pearson, mcnemar_exact

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class LayerResult:
    """One layer's dictionary with the tokens that it was built from and measured on."""

    layer: int
    material: Material
    held_out: Material
    found: LayerDictionary
    sources: Sources
    settings: ItdaSettings

    @cached_property
    def usage(self) -> Usage:
        """Codes of the held-out tokens."""
        return Usage(self.held_out, self.found.staged, self.settings.encoder)

    @cached_property
    def new(self) -> NewAtoms:
        """New atoms, ranked."""
        return ranked(self.usage, self.material, self.settings)

    @property
    def leading(self) -> np.ndarray:
        """Numbers of the new atoms that are shown one by one, best first."""
        return self.new.atom_A[: self.settings.listed_atoms]

    def layer_row(self) -> dict[str, Any]:
        """The row of `itda_layers`."""
        staged, usage = self.found.staged, self.usage
        sizes = (0, *staged.n_after_pass)
        base, tuned = (usage.in_base_atoms[side] for side in ("base", "tuned"))
        whole = usage.in_all_atoms["tuned"]
        n_base, n_whole = staged.n_base, len(staged.whole)
        fvu = {side: usage.fvu(side, code, n_base) for side, code in (("base", base), ("tuned", tuned))}
        return self._documents_row() | {
            "layer": self.layer,
            "n_tokens": len(self.material),
            "n_left_out": self.material.n_left_out,
            "n_outliers": self.material.n_outliers,
            "n_held_out": len(self.held_out),
            "base_atoms": staged.n_base,
            "is_saturated": sizes[-1] - sizes[-2] <= self.settings.settled_share * sizes[-1],
            "null_atoms": len(staged.null_token_I),
            "tuned_atoms": len(staged.added_token_I),
            "new_atoms": len(staged.new_I),
            "excess_atoms": len(staged.added_token_I) - len(staged.null_token_I),
            "mean_rotation": float(self._rotation_N()[staged.base.token_I].mean()),
            "base_fvu": fvu["base"],
            "tuned_fvu": fvu["tuned"],
            "whole_fvu": usage.fvu("tuned", whole, n_whole),
            "excess_fvu": fvu["tuned"] - fvu["base"],
            "difference_fvu": usage.difference_fvu(turned_ID(staged, self.material)),
            "base_l0": mean_l0(base, n_base),
            "tuned_l0": mean_l0(tuned, n_base),
            "whole_l0": mean_l0(whole, n_whole),
        }

    def pass_rows(self) -> Rows:
        """Rows of `itda_passes`."""
        staged = self.found.staged
        n_base, n_passes = staged.n_base, len(staged.n_after_pass)
        sizes = (0, *staged.n_after_pass)
        rows = [("base", number, *between) for number, between in enumerate(itertools.pairwise(sizes), start=1)]
        rows += [("null", n_passes + 1, n_base, n_base + len(staged.null_token_I)), ("tuned", n_passes + 1, n_base, len(staged.whole))]
        rows += [("tuned_alone", 1, 0, len(self.found.tuned_alone_I)), ("base_reordered", 1, 0, len(self.found.reordered_I))]
        return [
            {"layer": self.layer, "side": side, "pass": number, "atoms": size, "added": size - before}
            for side, number, before, size in rows
        ]

    def atom_columns(self, corpora: Sequence[str]) -> dict[str, Any]:
        """Columns of `itda_atoms`."""
        staged, rows = self.found.staged, self.material.rows
        token_I = staged.whole.token_I
        delta_I, significance = self.usage.published_delta()
        rank_I = np.empty(len(delta_I), np.int64)
        rank_I[np.argsort(-np.abs(delta_I), kind="stable")] = np.arange(1, len(delta_I) + 1)
        nulls = [None] * (len(token_I) - staged.n_base)
        return {
            "layer": [self.layer] * len(token_I),
            "atom": np.arange(len(token_I)).tolist(),
            "stage": ["base"] * staged.n_base + ["tuned"] * len(nulls),
            "source_corpus": [corpora[number] for number in rows.corpus_N[token_I]],
            "sequence": rows.sequence_N[token_I].tolist(),
            "position": rows.position_N[token_I].tolist(),
            "token": self.sources.tokens(self.material, token_I),
            "snippet": self.sources.snippets(self.material, token_I),
            "rotation": self._rotation_N()[token_I].tolist(),
            "published_delta": [*delta_I.tolist(), *nulls],
            "published_rank": [*rank_I.tolist(), *nulls],
            "p_value": [*significance.p_I.tolist(), *nulls],
            "q_value": [*significance.q_I.tolist(), *nulls],
        }

    def new_atom_columns(self) -> dict[str, Any]:
        """Columns of `itda_new_atoms`."""
        new = self.new
        return {
            "layer": [self.layer] * len(new),
            "atom": new.atom_A.tolist(),
            "rank": list(range(1, len(new) + 1)),
            "token": self.sources.tokens(self.material, new.token_A),
            "snippet": self.sources.snippets(self.material, new.token_A),
            "energy": new.energy_A.tolist(),
            "base_energy": new.base_energy_A.tolist(),
            "usage": new.usage_A.tolist(),
            "base_usage": new.base_usage_A.tolist(),
            "unexpressed": new.unexpressed_A.tolist(),
            "cluster": new.cluster_A.tolist(),
            "p_value": new.significance.p_I.tolist(),
            "q_value": new.significance.q_I.tolist(),
        }

    def token_rows(self, token_AT: np.ndarray, probability_AT: np.ndarray) -> Rows:
        """Rows of `itda_tokens` less the tokens' texts, from what the lens lists of the leading atoms' shifts."""
        weight_AT = self.new.weight_A[: len(token_AT), None] * probability_AT
        rows = []
        for token in np.unique(token_AT):
            part_A = np.where(token_AT == token, weight_AT, 0.0).sum(1)
            top = int(part_A.argmax())
            if part_A[top] > 0:
                rows.append(
                    {
                        "layer": self.layer,
                        "token_id": int(token),
                        "weight": float(part_A.sum()),
                        "n_atoms": int((part_A > 0).sum()),
                        "atom": int(self.new.atom_A[top]),
                        "snippet": self.sources.snippet(self.material, int(self.new.token_A[top])),
                    }
                )
        rows.sort(key=lambda row: (-row["weight"], row["token_id"]))
        return [row | {"rank": rank} for rank, row in enumerate(rows, start=1)]

    def activations(self) -> Iterator[tuple[PairedRows, np.ndarray]]:
        """The held-out tokens and the size of the leading new atoms in their tuned vectors, [A, N]."""
        if len(self.leading):
            yield self.held_out.rows, self.usage.sizes("tuned", self.leading).T

    def _rotation_N(self) -> np.ndarray:
        """1 − cos of both models' vectors as half their squared distance, which is exactly 0 for equal ones."""
        return (unit(self.material.base_ND) - unit(self.material.tuned_ND)).double().square().sum(1).div(2).clamp(0, 2).cpu().numpy()

    def _documents_row(self) -> dict[str, Any]:
        staged, material = self.found.staged, self.material
        everywhere = material.documents_of(np.arange(len(material)))
        tuned, null = (material.documents_of(each) for each in (staged.added_token_I, staged.null_token_I))
        tuned_share, null_share = (clopper_pearson(len(each), len(everywhere)) for each in (tuned, null))
        return {
            "n_documents": len(everywhere),
            "tuned_documents": len(tuned),
            "tuned_documents_low": tuned_share.low,
            "tuned_documents_high": tuned_share.high,
            "null_documents": len(null),
            "null_documents_high": null_share.high,
            "p_value": mcnemar_exact(len(np.setdiff1d(tuned, null)), len(np.setdiff1d(null, tuned))),
        }
