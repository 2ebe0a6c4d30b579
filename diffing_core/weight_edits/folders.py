"""An edit on disk: a PEFT folder where every change has factors and a module to lie on, else a Hugging Face checkpoint.

    write_edit(edit, model, registry, parent)  -> parent/<name>-<hash of everything that decides the weights>

A folder appears whole or not at all, and what is already there is not computed again. `weight_edit.json` in it says
what it was made of, and what of the finetunes it has not, since the base has no place for it.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffing_core.new_folder import new_folder
from diffing_core.registry import Registry
from diffing_core.settings import short_hash
from diffing_core.weight_edits.adapter_folder import AdaptableModules, write_adapter
from diffing_core.weight_edits.changes import Term, edited_tensors, left_out, registered_base, weighed_names
from diffing_core.weight_edits.checkpoint_folder import write_checkpoint
from diffing_core.weight_edits.finetunes import Finetunes, side_revision
from diffing_core.weight_edits.merging import write_merged
from diffing_core.weight_edits.specification import WeightEdit
from diffing_core.weight_files import OpenSide, WeightSide
from diffing_core.weights import OpenPair, WeightPair

VERSION = 3  # raise when the code of this package changes what is written
NOTE_FILE = "weight_edit.json"


def write_edit(edit: WeightEdit, model: str, registry: Registry, parent: Path) -> Path:
    """Writes the edited model as a folder of `parent` and returns it; base and finetunes come from the registry.

    Raises:
        RegistryError: an unknown model, organism or variant, or a specification that does nothing.
        ModelLoadError: weights that are missing, damaged or do not belong together.
        NotComputableError: changes that cannot be added or merged.
    """
    adapters = edit.effective()
    finetunes = Finetunes(model, registry)
    terms = [finetunes.term(each) for each in adapters]
    made_of = {
        "version": VERSION,
        "edit": edit.model_copy(update={"adapters": adapters}).model_dump(mode="json"),
        "model": model,
        "base": side_revision(terms[0].pair.base),
        "finetunes": [side_revision(term.pair.tuned) for term in terms],
    }
    target = parent / f"{edit.name}-{short_hash(made_of)}"
    if not target.is_dir():
        with new_folder(target) as aside:
            if edit.combine == "sum":
                kind = write_terms(aside, terms, from_source=True)
            else:
                kind = "lora"
                write_merged(aside, edit, terms)
            _note(aside, made_of | {"kind": kind, "left_out": left_out(terms)})
    return target


def write_terms(
    folder: Path, terms: Sequence[Term], modules: AdaptableModules | None = None, *, from_source: bool = False
) -> str:
    """Writes base + Σ terms into an empty folder; returns `lora` or `full`, the registry's word for what it is.

    `from_source`: an adapter is for the base's checkpoint alone, so the adapter that the registry adds to it is put in.

    Raises:
        NotComputableError: nothing changes, or bases differ.
    """
    base = registered_base(terms[0].pair)
    own = _own_adapter(terms[0].pair, base) if from_source else ()
    if is_low_rank((*own, *terms)):
        modules = modules or AdaptableModules.of_folder(base.folder, terms[0].pair.entry)
        if fits_adapter((*own, *terms), modules):
            write_adapter(folder, edited_tensors((*own, *terms)), modules, base.folder)
            return "lora"
    write_checkpoint(folder, edited_tensors(terms), base)
    return "full"


def is_low_rank(terms: Sequence[Term]) -> bool:
    """Whether every change in the sum has factors: known from the files' headers and what is kept, without computing it."""
    return all(_has_factors(term) for term in terms)


def fits_adapter(terms: Sequence[Term], modules: AdaptableModules) -> bool:
    """Whether the sum is written as an adapter: it has factors, and every changed matrix is the weight of a module."""
    return is_low_rank(terms) and all(_is_carried(term, modules) for term in terms)


def _own_adapter(pair: WeightPair, base: WeightSide) -> tuple[Term, ...]:
    """What makes the registered base of its checkpoint, if anything does."""
    return (Term(replace(pair, base=replace(base, adapters=()), tuned=base)),) if base.adapters else ()


def _has_factors(term: Term) -> bool:
    opened = OpenPair(term.pair)
    changed = [name for name, _ in weighed_names(term, opened)]
    if not changed:
        return True
    if term.rank is not None and not term.residual:
        return all(opened.experts(name) == (None,) for name in changed)  # no LoRA lies on a stack of experts
    base, tuned = OpenSide(term.pair.base), OpenSide(term.pair.tuned)
    if base.checkpoint.folder != tuned.checkpoint.folder or base.saved or tuned.saved:
        return False
    return all(side.is_low_rank(name) for side in (base, tuned) for name in side.touched())


def _is_carried(term: Term, modules: AdaptableModules) -> bool:
    """Whether every matrix that may change is the weight of a module that can carry a LoRA.

    A router or a state matrix may be a bare parameter, and what the files keep as one matrix per expert may run as a stack.
    """
    base, changed = OpenSide(term.pair.base), weighed_names(term, OpenPair(term.pair))
    return all(name in modules.by_weight for name, _ in changed if len(base.place(name).shape) == 2)


def _note(folder: Path, made_of: dict[str, Any]) -> None:
    (folder / NOTE_FILE).write_text(json.dumps(made_of, indent=1, sort_keys=True) + "\n", encoding="utf-8")
