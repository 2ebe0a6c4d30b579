"""An edited model to run, for as long as a `with` block lasts.

    with edited_subject(pair, Term(weights, uniform(2.0))) as subject: …

A change of low rank becomes one more adapter on the resident base and is taken out again; anything else is written as a
checkpoint to a passing folder of DIFFING_HOME, loaded beside the pair, and freed. Both go through the folders that everybody
gets.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from diffing_core.adapters import add_adapter, remove_adapter
from diffing_core.checkpoints import load_module
from diffing_core.errors import NotComputableError
from diffing_core.generation import own_stop_ids
from diffing_core.models import ModelPair
from diffing_core.new_folder import passing_folder
from diffing_core.settings import diffing_home
from diffing_core.subject import Subject
from diffing_core.weight_edits.adapter_folder import AdaptableModules
from diffing_core.weight_edits.changes import Term, edited_tensors, registered_base, terms_on_registered_base
from diffing_core.weight_edits.folders import write_terms
from diffing_core.weight_edits.merging import write_merged
from diffing_core.weight_edits.specification import WeightEdit

ADAPTER = "weight_edit"


@contextmanager
def edited_subject(pair: ModelPair, *terms: Term, merge: WeightEdit | None = None) -> Iterator[Subject]:
    """The pair's base side plus the terms' changes; the base side itself where nothing changes.

    What ends a text of either side ends one of the subject's: a finetune may have learnt to end where its base does not.

    The first term is the change of the pair itself. `merge`: a specification whose way to put changes together takes the
    place of the sum. Other sides may run meanwhile, but not inside of the subject's own `active()`.

    Raises:
        ModelLoadError: weights on disk that are damaged or do not belong to the pair.
        NotComputableError: a change that can neither be an adapter nor a checkpoint, or that cannot be merged.
    """
    if next(edited_tensors(terms), None) is None:
        yield pair.base
        return
    with passing_folder(diffing_home() / "edited_models") as aside:
        if merge is None or merge.combine == "sum":
            kind = write_terms(aside, terms_on_registered_base(terms), AdaptableModules(pair.base.plain))
        else:
            kind = "lora"
            write_merged(aside, merge, _mergeable(terms, merge))
        running = _on_resident(pair.base, aside) if kind == "lora" else _beside(pair, terms[0], aside)
        with running as subject:
            yield replace(subject, stop_ids=own_stop_ids(pair.base) + own_stop_ids(pair.tuned))


def _mergeable(terms: Sequence[Term], merge: WeightEdit) -> list[Term]:
    """The terms that change something; merges start at the registered base."""
    own = terms[0].pair
    if own.base != registered_base(own):
        raise NotComputableError(
            f"{merge.name}: this pair is compared with another finetune, which a merge by {merge.combine} would lack; "
            "use combine: sum"
        )
    return [term for term in terms if next(edited_tensors([term]), None) is not None]


@contextmanager
def _on_resident(base: Subject, folder: Path) -> Iterator[Subject]:
    """The adapter on the base's own module, which is as before when the block ends."""
    peft_model = add_adapter(base.module, folder, ADAPTER)
    try:
        yield replace(base.local(), module=peft_model, adapter=ADAPTER, revision=f"{base.revision}+{ADAPTER}")
    finally:
        remove_adapter(peft_model, ADAPTER)


@contextmanager
def _beside(pair: ModelPair, term: Term, folder: Path) -> Iterator[Subject]:
    entry, dtype = term.pair.entry, str(pair.tuned.dtype).removeprefix("torch.")
    module = load_module(folder, entry, dtype, pair.base.device, remote_code=entry.trust_remote_code)
    try:
        yield replace(pair.base.local(), module=module, adapter=None, revision=f"{pair.base.revision}+{ADAPTER}")
    finally:
        module.to("meta")  # frees the weights, whoever still holds the subject
