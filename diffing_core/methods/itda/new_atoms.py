"""The atoms that the tuned model added: ranked, clustered, and what tuning did to the tokens that they are.

    shift         h_tuned − h_base of the atom's token: what tuning added there
    unexpressed   the atom less its code in base atoms: what base could not say
    weight        energy, as in the reference; or added energy: energy in tuned vectors less that in base vectors of the
                  same tokens, since an atom is a whole token and may be used for what base has in it as well
    cluster       the first atom by rank that it is like, of those that are like no earlier one

Suffixes: A new atoms, D width.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from diffing_core.itda_dictionary import Staged
from diffing_core.lazy import torch
from diffing_core.methods.itda.material import Material
from diffing_core.methods.itda.settings import ItdaSettings, Ranking
from diffing_core.methods.itda.usage import Significance, Usage
from diffing_core.pursuit import Pursuit


@dataclass(frozen=True)
class NewAtoms:
    """New atoms of one layer, by weight; `atom_A` are their numbers in the dictionary, `token_A` in the material."""

    atom_A: np.ndarray
    token_A: np.ndarray
    weight_A: np.ndarray
    energy_A: np.ndarray
    base_energy_A: np.ndarray
    usage_A: np.ndarray
    base_usage_A: np.ndarray
    unexpressed_A: np.ndarray
    cluster_A: np.ndarray
    significance: Significance
    parts: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.atom_A)


def ranked(usage: Usage, material: Material, settings: ItdaSettings) -> NewAtoms:
    """All new atoms; `parts` [A, D] are directions to be read through a lens, named as above."""
    found = usage.found
    weight_A = weights(usage.energy("tuned", found.new_I), usage.energy("base", found.new_I), settings.ranked_by)
    order = np.argsort(-weight_A, kind="stable")
    atom_A = found.new_I[order]
    token_A = found.whole.token_I[atom_A]
    vector_AD = found.whole.atom_ID[atom_A]
    rest_AD = _unexpressed(vector_AD, found, settings.encoder)
    shift_AD = material.tuned_ND[token_A] - material.base_ND[token_A]
    cosine_A = torch.nn.functional.cosine_similarity(vector_AD, vector_AD - rest_AD, dim=1) if len(atom_A) else vector_AD[:, 0]
    return NewAtoms(
        atom_A,
        token_A,
        weight_A[order],
        usage.energy("tuned", atom_A),
        usage.energy("base", atom_A),
        usage.share_used("tuned", atom_A),
        usage.share_used("base", atom_A),
        (1 - cosine_A.double()).clamp(0, 2).cpu().numpy(),
        atom_A[clusters(vector_AD, settings.cluster_cosine)] if len(atom_A) else atom_A,
        usage.significance(atom_A),
        {
            name: part_AD.cpu().numpy()
            for name, part_AD in (("atom", vector_AD), ("unexpressed", rest_AD), ("shift", shift_AD))
        },
    )


def weights(tuned_A: np.ndarray, base_A: np.ndarray, ranked_by: Ranking) -> np.ndarray:
    """By which atoms are ranked and their tokens added up, never below zero; from their energies in both models' vectors."""
    return tuned_A if ranked_by == "energy" else np.maximum(tuned_A - base_A, 0.0)


def clusters(vector_AD: Any, min_cosine: float) -> np.ndarray:
    """For each unit vector the number of the first that leads its cluster; a leader is like no leader before it."""
    like_AA = (vector_AD @ vector_AD.T >= min_cosine).cpu().numpy()
    leader_A = np.arange(len(like_AA))
    leaders: list[int] = []
    for index, like_A in enumerate(like_AA):
        alike = [leader for leader in leaders if like_A[leader]]
        leader_A[index] = alike[0] if alike else index
        leaders += [] if alike else [index]
    return leader_A


def _unexpressed(vector_AD: Any, found: Staged, encoder: Pursuit) -> Any:
    if not len(vector_AD):
        return vector_AD
    return vector_AD - encoder.encode(vector_AD, found.base.atom_ID).reconstruction(found.base.atom_ID)
