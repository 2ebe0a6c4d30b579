"""LoRA adapters on one resident copy of their base: adding one safely, and switching between them.

All adapters of a cohort live in one PeftModel. Its resting state is "no adapter on", so the base is what
one gets when nothing is asked for. PEFT itself knows which adapter is on; nothing here keeps a second record.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from diffing_core.errors import LibraryErrors, ModelLoadError
from diffing_core.lazy import torch
from diffing_core.lora_forward import add_in_place
from diffing_core.safetensor_files import weight_files

BASE_CHANGING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_OWN_TENSORS = (".lora_", ".trainable_tokens_")
_MERGE = "merge it into its base and register the result as kind: full"


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The adapter's `adapter_config.json`.

    Raises:
        ModelLoadError: no such file, or no JSON object in it.
    """
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise ModelLoadError(f"{folder} has no adapter_config.json; for a whole checkpoint write kind: full")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise ModelLoadError(f"{file} is not JSON ({error}); save the adapter again") from error
    if not isinstance(config, dict):
        raise ModelLoadError(f"{file} holds {type(config).__name__}, not an object of settings; save the adapter again")
    return config


def is_switchable(folder: Path) -> bool:
    """Whether switching it gives base and tuned model: a LoRA that trains no bias and does not change W when it is loaded.

    An activated LoRA is none: PEFT leaves it off everywhere unless its own forward finds the invocation tokens. Replicated
    layers would be put into the base.
    """
    config = read_adapter_config(folder)
    start = str(config.get("init_lora_weights", "")).lower()
    plain = config.get("peft_type") == "LORA" and config.get("bias", "none") == "none"
    own = any(config.get(key) for key in ("kasa_config", "alora_invocation_tokens", "layer_replication"))
    return plain and not own and not start.startswith(BASE_CHANGING_STARTS)


def add_adapter(module: Any, folder: Path, name: str) -> Any:
    """Loads an adapter beside those already there and returns the PeftModel, with no adapter on.

    Raises:
        ModelLoadError: damaged weights, an adapter made for another base or one that is not switchable; the module
            is as before.
    """
    from peft import PeftConfig, PeftModel

    if not is_switchable(folder):
        raise ModelLoadError(f"adapter {folder} would change the base that others share: {_MERGE}")
    peft_model = module
    to_do = "; it was made for another base model, or its adapter_config.json is not its own"
    try:
        with LibraryErrors(f"adapter {folder} does not fit base {_class_name(module)}", to_do):
            _check_adapter_weights(module, folder)
            if not isinstance(module, PeftModel):
                peft_model = PeftModel(module, PeftConfig.from_pretrained(folder, inference_mode=True), name)
            with _each_asked_for_its_own(peft_model):
                result = peft_model.load_adapter(folder, name)
    except ModelLoadError:
        _take_out(peft_model, name)
        raise
    strays = [*result.missing_keys, *result.unexpected_keys]
    if strays:
        _take_out(peft_model, name)
        raise ModelLoadError(
            f"adapter {folder} does not fit base {_class_name(module)}: {len(result.missing_keys)} tensors are "
            f"missing and {len(result.unexpected_keys)} are left over, for example {strays[0]}; it was made for "
            "another base model, or its adapter_config.json is not its own"
        )
    add_in_place(peft_model, name)
    peft_model.requires_grad_(False)
    peft_model.base_model.disable_adapter_layers()
    return peft_model


def remove_adapter(peft_model: Any, name: str) -> None:
    """Takes an adapter out again; modules that no other adapter changes are the base's own as before."""
    from peft.tuners.lora import LoraLayer

    _KNOWN_SWITCHES.pop(peft_model, None)  # an adapter of the same name may come with other layers
    others = [each for each in peft_model.peft_config if each != name]
    if not others:
        _unload(peft_model)
        return
    peft_model.set_adapter(others[0], inference_mode=True)
    peft_model.delete_adapter(name)
    plain = peft_model.get_base_model()
    for path, layer in list(plain.named_modules()):
        if isinstance(layer, LoraLayer) and not layer.lora_A and not layer.lora_embedding_A:
            plain.set_submodule(path, layer.get_base_layer())
    peft_model.base_model.disable_adapter_layers()


@contextmanager
def switched(module: Any, adapter: str | None) -> Iterator[Any]:
    """The plain causal language model with exactly this adapter on; what was on before is restored."""
    if not is_wrapped(module):
        yield module
        return
    before = _adapter_on(module)
    _switch(module, adapter)
    try:
        yield module.get_base_model()
    finally:
        _switch(module, before)


def is_wrapped(module: Any) -> bool:
    """Whether the module carries PEFT adapters."""
    return hasattr(module, "get_base_model")


def _adapter_on(peft_model: Any) -> str | None:
    [layer, *_], _ = _switches(peft_model)
    return None if layer.disable_adapters else layer.active_adapters[0]


def _switch(peft_model: Any, adapter: str | None) -> None:
    """Leaves the model as PEFT's `disable_adapter_layers`, or `set_adapter` for inference, would.

    Not by these calls: they go through every module of every adapter for flags of gradients, which nothing here has, and
    take a tenth of a second with eight adapters of GPT-2 small's size.
    """
    if _adapter_on(peft_model) == adapter:
        return
    layers, wrappers = _switches(peft_model)
    for layer in layers:
        layer._disable_adapters = adapter is None
    for wrapper in wrappers:
        wrapper.enable_adapters(adapter is not None)
    if adapter is None:
        return
    peft_model.active_adapter = peft_model.base_model.active_adapter = adapter
    for layer in layers:
        layer._active_adapter = [adapter]
    for wrapper in wrappers:
        wrapper.set_adapter([adapter] if adapter in wrapper._adapters else [], inference_mode=True)


_KNOWN_SWITCHES: WeakKeyDictionary[Any, tuple[frozenset[str], list[Any], list[Any]]] = WeakKeyDictionary()


def _switches(peft_model: Any) -> tuple[list[Any], list[Any]]:
    """The adapted layers, and PEFT's wrappers of modules that are stored whole; searched once for a set of adapters."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    names, layers, wrappers = _KNOWN_SWITCHES.get(peft_model, (None, [], []))
    if names != frozenset(peft_model.peft_config):
        modules = list(peft_model.modules())
        layers = [module for module in modules if isinstance(module, peft_model.base_model.tuner_layer_cls)]
        wrappers = [module for module in modules if isinstance(module, AuxiliaryTrainingWrapper)]
        _KNOWN_SWITCHES[peft_model] = frozenset(peft_model.peft_config), layers, wrappers
    return layers, wrappers


@contextmanager
def _each_asked_for_its_own(peft_model: Any) -> Iterator[None]:
    """PEFT's `load_adapter` wants, of every module with trained tokens, rows of the new adapter, which may have none there."""
    from peft.utils.other import TrainableTokensWrapper

    def asks_only_its_own(wrapper: Any) -> None:
        load_map = wrapper.adapter_state_dict_load_map
        wrapper.adapter_state_dict_load_map = lambda name: load_map(name) if name in wrapper._adapters else {}

    wrappers = [module for module in peft_model.modules() if isinstance(module, TrainableTokensWrapper)]
    for wrapper in wrappers:
        asks_only_its_own(wrapper)
    try:
        yield
    finally:
        for wrapper in wrappers:
            del wrapper.adapter_state_dict_load_map


def _take_out(peft_model: Any, name: str) -> None:
    """Undoes a failed load: the other adapters stay, or the plain model becomes whole again."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    _KNOWN_SWITCHES.pop(peft_model, None)
    if not is_wrapped(peft_model):  # it failed half way through wrapping
        for path, layer in list(peft_model.named_modules()):
            if isinstance(layer, AuxiliaryTrainingWrapper):
                peft_model.set_submodule(path, layer.original_module)
            elif isinstance(layer, BaseTunerLayer) and not path.endswith(".token_adapter"):
                peft_model.set_submodule(path, layer.get_base_layer())
    elif name in peft_model.peft_config:
        remove_adapter(peft_model, name)
    else:
        peft_model.base_model.disable_adapter_layers()


def _unload(peft_model: Any) -> None:
    """The plain model again; of a module that an adapter stores whole, PEFT alone would leave the adapter's in its place."""
    _, wrappers = _switches(peft_model)
    for wrapper in wrappers:
        wrapper.set_adapter([], inference_mode=True)
    _KNOWN_SWITCHES.pop(peft_model, None)
    peft_model.unload()


def _check_adapter_weights(module: Any, folder: Path) -> None:
    """Finite numbers, and no plain weight that PEFT would write over the shared base."""
    from safetensors.torch import load_file

    kept = tuple(read_adapter_config(folder).get("modules_to_save") or ())
    plain = module.get_base_model() if is_wrapped(module) else module
    for file in weight_files(folder):
        for name, tensor in load_file(file).items():
            if not torch.isfinite(tensor).all():
                raise ModelLoadError(f"{file}: tensor {name} holds NaN or infinite values; save the adapter again")
            path = name.removeprefix("base_model.model.").rpartition(".")[0].removesuffix(".base_layer")
            if not any(part in name for part in _OWN_TENSORS) and not path.endswith(kept):
                _check_same_weight(plain, path, tensor, file)


def _check_same_weight(plain: Any, path: str, tensor: Any, file: Path) -> None:
    """Embeddings stored along with an adapter must be the base's own: they are shared by every pair."""
    own = getattr(dict(plain.named_modules()).get(path), "weight", None)
    if own is None or own.shape != tensor.shape or not torch.equal(own, tensor.to(own)):
        size = "a weight that it lacks" if own is None else f"one of shape {tuple(own.shape)}"
        raise ModelLoadError(
            f"{file} stores its own {path} of shape {tuple(tensor.shape)}, the base has {size} with other values: "
            f"loading it would change the base for every pair (a resized vocabulary does this); {_MERGE}"
        )


def _class_name(module: Any) -> str:
    return type(module.get_base_model() if is_wrapped(module) else module).__name__
