"""Merges that are no plain sum (TIES, DARE, pruning, SVD), computed by PEFT's own `add_weighted_adapter`.

Each finetune's edited change is first an adapter of its own, so weights per block and ranks apply before the merge. All
of them need the same ranks, unless the kind of merge ends in `svd`. DARE draws at random: the seed makes it repeatable.

Reference: Yadav et al. 2023 (TIES); Yu et al. 2024 (DARE).
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from diffing_core.checkpoints import load_module
from diffing_core.errors import NotComputableError
from diffing_core.lazy import torch
from diffing_core.new_folder import passing_folder
from diffing_core.weight_edits.adapter_folder import AdaptableModules, write_adapter
from diffing_core.weight_edits.changes import Term, edited_tensors
from diffing_core.weight_edits.specification import WeightEdit

MERGED = "merged"


def write_merged(folder: Path, edit: WeightEdit, terms: Sequence[Term]) -> None:
    """Writes the merge of the terms as one adapter.

    Raises:
        NotComputableError: a change that is no adapter, or that PEFT cannot merge in the way asked for.
    """
    from peft import PeftModel

    base, entry = terms[0].pair.base.folder, terms[0].pair.entry
    if entry.adapter:
        raise NotComputableError(
            f"{edit.name}: the registry adds an adapter to {entry.name}, which a merge by {edit.combine} would lack; "
            "use combine: sum, or register the merged base"
        )
    module = load_module(base, entry, "float32", "cpu", remote_code=entry.trust_remote_code)
    modules = AdaptableModules(module)
    with passing_folder(folder) as aside:
        places = [aside / f"term{number}" for number in range(len(terms))]
        for place, term in zip(places, terms, strict=True):
            place.mkdir()
            write_adapter(place, edited_tensors([term]), modules, base)
        peft_model = PeftModel.from_pretrained(module, places[0], places[0].name)
        for place in places[1:]:
            peft_model.load_adapter(place, place.name)
        density = {} if edit.density is None else {"density": edit.density}
        names = [place.name for place in places]
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(edit.seed)
                peft_model.add_weighted_adapter(names, [1.0] * len(names), MERGED, edit.combine, **density)
        except (ValueError, RuntimeError) as error:
            raise NotComputableError(
                f"{edit.name}: PEFT cannot merge these adapters by {edit.combine}: {str(error).strip()[:300]}; "
                "combine: sum takes any ranks, the kinds that end in svd too"
            ) from error
        peft_model.save_pretrained(aside, selected_adapters=[MERGED])
        for file in (aside / MERGED).glob("adapter_*"):
            shutil.move(file, folder / file.name)
