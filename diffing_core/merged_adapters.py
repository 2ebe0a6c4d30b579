"""Checkpoints with adapters merged in, for adapters whose change is not read from their own files (IA³, LoHa, VeRA, …).

PEFT builds the base with the adapter and merges it, in float32 on the processor, one model at a time. The result lies
in `$DIFFING_HOME/merged_adapters/<hash of base and adapters>`; it is made once and can be deleted at any time.
"""

import logging
import shutil
from pathlib import Path
from typing import Any

from diffing_core.adapters import read_adapter_config
from diffing_core.checkpoints import load_module
from diffing_core.errors import LibraryErrors, ModelLoadError, NotComputableError
from diffing_core.lazy import torch
from diffing_core.new_folder import new_folder
from diffing_core.registry import Model, Source
from diffing_core.safetensor_files import content_hash
from diffing_core.settings import diffing_home, short_hash

logger = logging.getLogger(__name__)

_STARTS_FROM_DATA = ("corda", "loftq", "lora_ga")


def merged(folder: Path, adapters: tuple[Path, ...], *, remote_code: bool = False) -> Path:
    """A folder with the base's checkpoint, the adapters merged into it in their order.

    `remote_code` allows code of the base's folder to run. Several processes may make the same folder: the first one's stays.

    Raises:
        ModelLoadError: damaged weights, or an adapter made for another base.
        NotComputableError: an adapter that adds no weights or acts on some tokens only, or whose starting point its folder
            does not tell.
    """
    import peft

    for adapter in adapters:
        _check_mergeable(adapter)
    identity = short_hash([peft.__version__, *map(content_hash, (folder, *adapters))])
    target = diffing_home() / "merged_adapters" / identity
    if target.is_dir():
        return target
    logger.info("merging %s into %s", ", ".join(map(str, adapters)), folder)
    entry = Model(name="base", source=Source(path=folder), trust_remote_code=remote_code)
    module = load_module(folder, entry, "float32", "cpu", remote_code=remote_code)
    for adapter in adapters:
        module = _with_adapter(module, adapter)
    with new_folder(target) as unfinished:
        module.save_pretrained(unfinished)
        for code in folder.glob("*.py"):
            shutil.copyfile(code, unfinished / code.name)
    return target


def _check_mergeable(folder: Path) -> None:
    """Refuses, by the configuration alone, what no weights can say."""
    from peft import PeftConfig

    read_adapter_config(folder)
    with LibraryErrors(f"cannot read adapter {folder}"):
        config = PeftConfig.from_pretrained(folder, inference_mode=True)
    start = str(getattr(config, "init_lora_weights", "")).lower()
    if config.is_prompt_learning:
        raise NotComputableError(f"adapter {folder} ({config.peft_type.value}) adds inputs and changes no weight")
    if getattr(config, "alora_invocation_tokens", None):
        raise NotComputableError(
            f"adapter {folder} is an activated LoRA: it acts only behind its invocation tokens, so no weights are the tuned "
            "model's; to compare what it does where it acts, take alora_invocation_tokens out of a copy's adapter_config.json"
        )
    if getattr(config, "layer_replication", None):
        raise NotComputableError(f"adapter {folder} repeats blocks of the base (layer_replication): its blocks are no longer the base's")
    if start.startswith(_STARTS_FROM_DATA):
        raise NotComputableError(
            f"adapter {folder} was begun with {start}, which also changed the base, by data or codes that its folder "
            "does not hold; merge it where it was trained and register the result as kind: full"
        )


def _with_adapter(module: Any, folder: Path) -> Any:
    """The plain module with one adapter merged; starts that draw random numbers draw the same ones every time."""
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(folder, inference_mode=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            wrapped = PeftModel(module, config)
            loaded = wrapped.load_adapter(folder, "default")
            strays = [*_missing(wrapped, loaded.missing_keys), *loaded.unexpected_keys]
            if not strays:
                return _merge_of(wrapped)(safe_merge=True)
        except (AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise NotComputableError(
                f"PEFT cannot merge adapter {folder} ({config.peft_type.value}) into {type(module).__name__}: "
                f"{str(error).strip()[:400]}"
            ) from error
    raise ModelLoadError(
        f"adapter {folder} does not fit {type(module).__name__}: {len(strays)} tensors are missing or left over, for "
        f"example {strays[0]}; it was made for another base model"
    )


def _missing(wrapped: Any, keys: list[str]) -> list[str]:
    """Those keys whose tensor has no other name by which it was loaded: VB-LoRA's modules share one bank of vectors."""
    tensors = dict(wrapped.named_parameters(remove_duplicate=False))
    loaded = {id(tensor) for key, tensor in tensors.items() if key not in keys}
    return [key for key in keys if key not in tensors or id(tensors[key]) not in loaded]


def _merge_of(wrapped: Any) -> Any:
    merge = getattr(wrapped, "merge_and_unload", None)
    if merge is None:
        raise NotImplementedError("this kind has no merge_and_unload")
    return merge
