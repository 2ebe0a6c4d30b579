"""The state of an unfinished training as one file: continued from it, a run ends with the same weights bit by bit.

Held: weights, Adam's moments, tokens since each latent fired, the step, and the log so far. The place in the data is
the step: batches come in an order that the seed decides.
"""

import json
import logging
import os
from pathlib import Path
from typing import Any

from diffing_core.errors import StorageError
from diffing_core.lazy import torch

logger = logging.getLogger(__name__)


def save_checkpoint(file: Path, trainer: Any, step: int, log: list[dict[str, float]], config: dict[str, Any]) -> None:
    """Writes the trainer after `step` whole steps, beside the place and then in one move."""
    from safetensors.torch import save_file

    tensors = {f"weights.{name}": tensor for name, tensor in trainer.ae.state_dict().items()}
    for number, state in trainer.optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{number}.{name}": tensor for name, tensor in state.items()}
    tensors["tokens_since_fired"] = trainer.num_tokens_since_fired
    aside = file.with_suffix(".part")
    facts = {"step": step, "log": log, "config": config}
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, aside, {"facts": json.dumps(facts)})
    os.replace(aside, file)


def load_checkpoint(file: Path, trainer: Any, config: dict[str, Any]) -> tuple[int, list[dict[str, float]]]:
    """Puts a newly made trainer where `save_checkpoint` left it; gives the step and the log.

    A trainer of other stored activations was left elsewhere: the new one stays as it is, at step 0.

    Raises:
        StorageError: the file was written by a training of another configuration.
    """
    from safetensors import safe_open

    with safe_open(file, framework="pt", device=str(trainer.device)) as stored:
        facts = json.loads(stored.metadata()["facts"])
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - a file, no dict
    if trained_on_others(file, facts["config"], config):
        return 0, []
    check_same(file, facts["config"], config)
    trainer.ae.load_state_dict(_below("weights.", tensors))
    adam: dict[int, dict[str, Any]] = {}
    for name, tensor in _below("adam.", tensors).items():
        number, what = name.split(".")
        adam.setdefault(int(number), {})[what] = tensor
    step, optimizer = facts["step"], trainer.optimizer
    optimizer.load_state_dict({"state": adam, "param_groups": optimizer.state_dict()["param_groups"]})
    trainer.scheduler.load_state_dict(trainer.scheduler.state_dict() | {"last_epoch": step, "_step_count": step + 1})
    for group, rate, factor in zip(
        optimizer.param_groups, trainer.scheduler.base_lrs, trainer.scheduler.lr_lambdas, strict=True
    ):
        group["lr"] = rate * factor(step)
    trainer.num_tokens_since_fired = tensors["tokens_since_fired"].to(torch.long)
    return step, facts["log"]


def trained_on_others(file: Path, found: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Whether a file is of other bytes of stored activations than there are now; said in the log.

    A result's identity holds revisions and corpora, not these bytes, so they may have been written anew under it.
    """
    ours, now = found.get("activations"), expected["activations"]
    if ours != now:
        logger.info("%s was trained on stored activations %s, which are now %s: training anew", file, ours, now)
    return ours != now


def check_same(file: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raises StorageError unless a file was written under the expected configuration, the statistics of its input included."""
    differing = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if differing:
        raise StorageError(f"{file} belongs to another training: {', '.join(differing)} differ; delete it and run again")


def _below(prefix: str, tensors: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
