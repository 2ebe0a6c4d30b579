"""Merges that are no plain sum (TIES, DARE, pruning, SVD), computed by PEFT's own `add_weighted_adapter`.

LoRAs that are taken whole, each with one weight, are merged from their own factors and scales with these weights, as PEFT merges
them. PEFT takes the merge's configuration from the first adapter, its rsLoRA and its choice of layers too, which would scale the
result once more and leave out what only the others change; so each is given again with every module named, and rank and scale of each.
As soon as one of several is anything else (weights per block, a rank, a turn, a checkpoint cut to a rank), every edited change is
first an adapter of its own, and these are merged with weight 1. PEFT scales both factors of a whole LoRA by √|weight · α/r| and
elects signs without weights, where an edited one has all its scale in B; only `svd` makes no difference between them. All need the
same ranks, unless the kind of merge ends in `svd`. DARE draws at random: the seed makes it repeatable.

Reference: Yadav et al. 2023 (TIES); Yu et al. 2024 (DARE).
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffing_core.checkpoints import load_module
from diffing_core.errors import NotComputableError
from diffing_core.lazy import torch
from diffing_core.new_folder import passing_folder
from diffing_core.weight_edits.adapter_folder import AdaptableModules, write_adapter, write_whole
from diffing_core.weight_edits.changes import Term, edited_tensors, n_layers
from diffing_core.weight_edits.specification import WeightEdit, resolve
from diffing_core.weight_files import OpenSide

MERGED = "merged"


def write_merged(folder: Path, edit: WeightEdit, terms: Sequence[Term]) -> None:
    """Writes the merge of the terms as one adapter.

    Raises:
        NotComputableError: a change that is no adapter, or that PEFT cannot merge in the way asked for.
    """
    from peft import PeftModel

    base, entry = terms[0].pair.base.folder, terms[0].pair.entry
    if len(terms) == 1 and edit.density is not None:
        raise NotComputableError(
            f"{edit.name}: only one finetune changes anything, and PEFT takes one adapter as it is, without {edit.combine}; "
            "name a second finetune, or use combine: sum"
        )
    if entry.adapter:
        raise NotComputableError(
            f"{edit.name}: the registry adds an adapter to {entry.name}, which a merge by {edit.combine} would lack; "
            "use combine: sum, or register the merged base"
        )
    module = load_module(base, entry, "float32", "cpu", remote_code=entry.trust_remote_code)
    modules = AdaptableModules(module)
    with passing_folder(folder) as aside:
        places, weights = _whole_loras(aside, terms, modules) or _edited_loras(aside, terms, modules)
        names = [f"term{number}" for number in range(len(places))]
        peft_model = PeftModel.from_pretrained(module, places[0], names[0])
        for place, name in zip(places[1:], names[1:], strict=True):
            peft_model.load_adapter(place, name)
        density = {} if edit.density is None else {"density": edit.density}
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(edit.seed)
                peft_model.add_weighted_adapter(names, weights, MERGED, edit.combine, svd_full_matrices=False, **density)
        except (ValueError, RuntimeError) as error:
            raise NotComputableError(
                f"{edit.name}: PEFT cannot merge these adapters by {edit.combine}: {str(error).strip()[:300]}; "
                "combine: sum takes any ranks, the kinds that end in svd too"
            ) from error
        _tell_ranks(peft_model)
        peft_model.save_pretrained(aside, selected_adapters=[MERGED])
        for file in (aside / MERGED).glob("adapter_*"):
            shutil.move(file, folder / file.name)


def _whole_loras(aside: Path, terms: Sequence[Term], modules: AdaptableModules) -> tuple[list[Path], list[float]] | None:
    """Folders of the adapters and their weights, where all are plain LoRAs that are taken whole with one weight each.

    Of a LoRA on what is no module PEFT would load the rest and warn.
    """
    places, weights, adapters = [], [], []
    for number, term in enumerate(terms):
        tuned, base = OpenSide(term.pair.tuned), term.pair.base
        resolved = resolve(term.amplifications, n_layers(base))
        own = {resolved.outside}.union(*resolved.layers)
        is_one_lora = tuned.checkpoint.folder == base.folder and len(tuned.adapters) == 1 and not tuned.saved and bool(tuned.touched())
        is_plain = is_one_lora and all(tuned.is_low_rank(name) and name in modules.by_weight for name in tuned.touched())
        if not is_plain or term.rank is not None or term.turn_seed is not None or len(own) > 1 or own == {0.0}:
            return None
        adapters += tuned.adapters.values()
        places.append(aside / f"whole{number}")
        weights.append(own.pop())
    for place, adapter in zip(places, adapters, strict=True):
        place.mkdir()
        write_whole(place, adapter, modules, terms[0].pair.base.folder)
    return places, weights


def _edited_loras(aside: Path, terms: Sequence[Term], modules: AdaptableModules) -> tuple[list[Path], list[float]]:
    """Each term's edited change as an adapter of its own."""
    places = [aside / f"term{number}" for number in range(len(terms))]
    for place, term in zip(places, terms, strict=True):
        place.mkdir()
        write_adapter(place, edited_tensors([term]), modules, term.pair.base.folder)
    return places, [1.0] * len(places)


def _tell_ranks(peft_model: Any) -> None:
    """Puts into the merge's configuration the ranks that are not its largest; PEFT leaves them out, and could not load the folder."""
    from peft.tuners.lora import LoraLayer

    config, ranks = peft_model.peft_config[MERGED], {}
    for path, layer in peft_model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer) and MERGED in layer.scaling:
            is_linear = MERGED in layer.lora_A
            ranks[path] = len(layer.lora_A[MERGED].weight if is_linear else layer.lora_embedding_A[MERGED])
    config.rank_pattern = {path: rank for path, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = dict(config.rank_pattern)
