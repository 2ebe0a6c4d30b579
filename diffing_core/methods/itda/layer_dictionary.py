"""The dictionaries of one layer, built or read back from the result's folder.

    layer_<i>.safetensors    atoms [I, D]; the tokens they are, by number, text and position; those of the other passes
    layer_<i>.json           how they were built; written last, so that a layer without it is built again

The two others are of one pass each: the tuned model's own, and the base's with its tokens in another order, whose overlap
with the base's is the most that two dictionaries of one layer can have in common.
"""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffing_core.itda_dictionary import Advance, Construction, Dictionary, Staged, grown, staged, unit
from diffing_core.lake import replace_file
from diffing_core.lazy import torch
from diffing_core.methods.itda.material import Material

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerDictionary:
    """The staged dictionary, and the tokens [I] of the tuned model's own and of the reordered base's."""

    staged: Staged
    tuned_alone_I: np.ndarray
    reordered_I: np.ndarray

    @property
    def first_pass_I(self) -> np.ndarray:
        """Tokens of the base's dictionary after its first pass: what the other two are compared with."""
        return self.staged.whole.token_I[: self.staged.n_after_pass[0]]


def passes(how: Construction) -> int:
    """Passes over the tokens that a layer takes at most."""
    return how.max_passes + 4


def build(material: Material, how: Construction, advance: Advance) -> LayerDictionary:
    """Saturates on the base, continues on the tuned model, and makes the two dictionaries of one pass."""
    base_ND, tuned_ND = unit(material.base_ND), unit(material.tuned_ND)
    alone = grown(Dictionary.empty(tuned_ND), tuned_ND, how, advance)
    order = np.random.default_rng(0).permutation(len(base_ND))
    reordered = grown(Dictionary.empty(base_ND), base_ND[torch.from_numpy(order)], how, advance)
    return LayerDictionary(staged(base_ND, tuned_ND, how, advance), alone.token_I, order[reordered.token_I])


@dataclass(frozen=True)
class Kept:
    """Where a layer's dictionary is kept, and the fingerprint of the stored activations that it is of."""

    folder: Path
    layer: int
    fingerprint: str

    @property
    def tensors(self) -> Path:
        """Atoms and tokens."""
        return self.folder / f"layer_{self.layer}.safetensors"

    @property
    def facts(self) -> Path:
        """How they were built."""
        return self.folder / f"layer_{self.layer}.json"


def kept_or_built(kept: Kept, material: Material, how: Construction, advance: Advance) -> LayerDictionary:
    """What an earlier run finished with the same activations, tokens and construction, else built and kept."""
    config = json.loads(json.dumps(asdict(how))) | {"n_tokens": len(material), "activations": kept.fingerprint}
    if kept.facts.exists():
        said = json.loads(kept.facts.read_text())
        found = _loaded(kept.tensors, said, material) if said["config"] == config else None
        if found is not None:
            return found
        logger.warning("%s was built from other activations, of other tokens or in another way: it is built anew", kept.tensors)
        kept.facts.unlink()
    built = build(material, how, advance)
    _save(built, material, kept.tensors)
    told = {"layer": kept.layer, "config": config, "n_base": built.staged.n_base, "n_after_pass": built.staged.n_after_pass}
    replace_file(kept.facts, lambda aside: aside.write_text(json.dumps(told, indent=1)))
    return built


def _save(built: LayerDictionary, material: Material, path: Path) -> None:
    from safetensors.torch import save_file

    whole = built.staged.whole
    tensors = {"atom": whole.atom_ID.cpu().contiguous()} | {
        name: torch.from_numpy(np.ascontiguousarray(values, np.int64))
        for name, values in {
            "token": whole.token_I,
            **_place(material, whole.token_I),
            "null_token": built.staged.null_token_I,
            "tuned_alone_token": built.tuned_alone_I,
            "reordered_token": built.reordered_I,
        }.items()
    }
    replace_file(path, lambda aside: save_file(tensors, aside))


def _place(material: Material, token_I: np.ndarray) -> dict[str, np.ndarray]:
    """Where tokens are from."""
    return {name: getattr(material.rows, f"{name}_N")[token_I] for name in ("corpus", "sequence", "position")}


def _loaded(path: Path, said: dict[str, Any], material: Material) -> LayerDictionary | None:
    """What is kept; None if its atoms are not the tokens that the material has at their numbers."""
    from safetensors.torch import load_file

    held = load_file(path)
    token_I = held["token"].numpy()
    if not all(np.array_equal(held[name].numpy(), place_I) for name, place_I in _place(material, token_I).items()):
        return None
    whole = Dictionary(held["atom"].to(material.base_ND.device), token_I)
    built = Staged(whole, said["n_base"], tuple(said["n_after_pass"]), held["null_token"].numpy())
    return LayerDictionary(built, held["tuned_alone_token"].numpy(), held["reordered_token"].numpy())
