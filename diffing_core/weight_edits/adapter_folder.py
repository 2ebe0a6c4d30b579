"""Low-rank changes as an ordinary PEFT folder, which stock PEFT and vLLM load.

Every scale lies in the factors: each module has α equal to its own rank r, so whoever divides α by r, with or without the
patterns, multiplies by one. Ranks may differ between modules; `r` in the configuration is the largest of them (vLLM's
`max_lora_rank` must be at least that).

Suffixes: M rows (outputs), N columns (inputs), R rank.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffing_core.checkpoints import auto_class
from diffing_core.errors import ModelLoadError, NotComputableError
from diffing_core.lazy import torch
from diffing_core.registry import Model
from diffing_core.tensor_names import canonical
from diffing_core.weight_edits.changes import EditedTensor
from diffing_core.weight_files import Adapter

PREFIX = "base_model.model."


@dataclass(frozen=True)
class Adaptable:
    """A module that can carry a LoRA: where it is in the model, and its class."""

    path: str
    is_embedding: bool
    is_conv1d: bool


class AdaptableModules:
    """The modules of one architecture that can carry a LoRA, by the canonical name of their weight."""

    def __init__(self, model: Any) -> None:
        self.by_weight = {canonical(f"{each.path}.weight"): each for each in _adaptable(model)}
        head = model.get_output_embeddings()
        paths = {module: path for path, module in model.named_modules()}
        self.head = Adaptable(paths[head].removesuffix(".base_layer"), is_embedding=False, is_conv1d=False)

    @classmethod
    def of_folder(cls, folder: Path, entry: Model) -> "AdaptableModules":
        """Those of a checkpoint's architecture; its weights are not read.

        Raises:
            ModelLoadError: a configuration that transformers refuses.
        """
        import transformers

        code = {"trust_remote_code": entry.trust_remote_code}
        try:
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, **code)
            with torch.device("meta"):
                model = auto_class(config).from_config(config, **code)
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise ModelLoadError(f"cannot build the architecture in {folder}: {str(error).strip()[:400]}") from error
        return cls(model)

    def module(self, name: str) -> Adaptable:
        """The module of a weight; raises NotComputableError for a weight that no LoRA can change."""
        if name not in self.by_weight:
            raise NotComputableError(
                f"{name} is the weight of no linear layer or embedding, so no adapter can change it; add changes "
                "up (`combine: sum`), and a whole checkpoint is written"
            )
        return self.by_weight[name]


def write_adapter(folder: Path, tensors: Iterable[EditedTensor], modules: AdaptableModules, base: Path) -> int:
    """Writes `adapter_model.safetensors` and `adapter_config.json`; returns the largest rank.

    Raises:
        NotComputableError: a change without factors, or of a weight that no LoRA can change; or no change at all.
    """
    state: dict[str, Any] = {}
    ranks: dict[str, int] = {}
    conv1d = False
    for tensor in tensors:
        module = modules.module(tensor.name)
        for each in (module, modules.head) if tensor.heads_too else (module,):
            state |= _factor_tensors(tensor, each)
            ranks[each.path] = tensor.factors.left_MR.shape[1]
            conv1d |= each.is_conv1d
    if not ranks:
        raise NotComputableError(f"nothing to write to {folder.name}: no weight of {base} is changed")
    return _save(folder, state, ranks, ranks, base, conv1d=conv1d)


def write_whole(folder: Path, adapter: Adapter, modules: AdaptableModules, base: Path) -> int:
    """Writes a plain LoRA once more, with the factors and scales that it has and every module named; returns the largest rank."""
    state: dict[str, Any] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    conv1d = False
    for name, lora in adapter.lora.items():
        module, rank = modules.module(name), lora.a.shape[0]
        keys = ("lora_embedding_A", "lora_embedding_B") if lora.embedding else ("lora_A.weight", "lora_B.weight")
        state |= {f"{PREFIX}{module.path}.{key}": each.read().float() for key, each in zip(keys, (lora.a, lora.b), strict=True)}
        ranks[module.path], alphas[module.path] = rank, rank * adapter.scale(lora.path, rank)
        conv1d |= module.is_conv1d
    start = adapter.config.get("init_lora_weights", True)  # decides how many random numbers PEFT draws before it merges
    return _save(folder, state, ranks, alphas, base, conv1d=conv1d, start=start if start in (False, "gaussian") else True)


def _save(
    folder: Path,
    state: Mapping[str, Any],
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    base: Path,
    *,
    conv1d: bool,
    start: bool | str = True,
) -> int:
    from peft import LoraConfig
    from safetensors.torch import save_file

    largest = max(ranks.values())
    config = LoraConfig(
        r=largest,
        lora_alpha=largest,
        rank_pattern={path: rank for path, rank in ranks.items() if rank != largest},
        alpha_pattern={path: alpha for path, alpha in alphas.items() if alpha != largest},
        target_modules=sorted(ranks),
        init_lora_weights=start,
        base_model_name_or_path=str(base),
        task_type="CAUSAL_LM",
        fan_in_fan_out=conv1d,
        inference_mode=True,
    )
    save_file(dict(state), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    return largest


def _adaptable(model: Any) -> Iterator[Adaptable]:
    for path, module in model.named_modules():
        kind = type(module).__name__
        embedding = isinstance(module, torch.nn.Embedding)
        if ".lora_" not in path and (embedding or kind == "Conv1D" or isinstance(module, torch.nn.Linear)):
            yield Adaptable(path.removesuffix(".base_layer"), embedding, kind == "Conv1D")


def _factor_tensors(tensor: EditedTensor, module: Adaptable) -> dict[str, Any]:
    if tensor.factors is None:
        raise NotComputableError(
            f"the change of {tensor.name} has no factors, so it cannot go into an adapter; give the finetune a rank"
        )
    left_MR, right_RN = tensor.factors.left_MR, tensor.factors.right_RN
    if module.is_embedding:
        pair = {"lora_embedding_A": left_MR.T, "lora_embedding_B": right_RN.T}
    else:
        pair = {"lora_A.weight": right_RN, "lora_B.weight": left_MR}
    return {f"{PREFIX}{module.path}.{key}": value.contiguous().clone() for key, value in pair.items()}
