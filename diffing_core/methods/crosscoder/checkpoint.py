"""A training run on disk: what an interrupted one needs to go on as if nothing had happened, and what a finished one left.

    checkpoint.safetensors     weights, Adam's moments, silence of the latents; step, place in the data and log beside them
    crosscoder.safetensors     weights, in the scaled units in which they were trained
    crosscoder.json            how they are to be used: threshold, scales, partition, k, layer, and the log

The identity of a result holds revisions and corpora, not the stored activations' bytes, which may have been written
anew; so both files name the fingerprint of what was fitted on, and what was fitted on other bytes is not used.

No pickles: a folder from elsewhere can be read safely. Files appear whole or not at all.
"""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from diffing_core.errors import StorageError
from diffing_core.lazy import torch
from diffing_core.methods.crosscoder.model import Crosscoder
from diffing_core.methods.crosscoder.partition import Partition
from diffing_core.methods.crosscoder.training import Training

CHECKPOINT, WEIGHTS, CONFIG = "checkpoint.safetensors", "crosscoder.safetensors", "crosscoder.json"
MOMENTS = ("exp_avg", "exp_avg_sq")
PLACE = ("done", "epoch", "batch", "log")
logger = logging.getLogger(__name__)


def keep(training: Training, folder: Path, fingerprint: str) -> None:
    """Writes the state of a run that is between two steps; `fingerprint` is of the activations that it reads."""
    tensors = {f"weight/{name}": tensor.detach() for name, tensor in training.parameters.items()}
    for name, tensor in training.parameters.items():
        state = training.optimizer.state.get(tensor, {})
        tensors |= {f"{moment}/{name}": state[moment] for moment in MOMENTS if moment in state}
    tensors["silent"] = training.silent_F
    place = {name: getattr(training, name) for name in PLACE} | {"n_steps": training.plan.steps, "activations": fingerprint}
    _save(tensors, folder / CHECKPOINT, {"place": json.dumps(place)})


def resume(training: Training, folder: Path, fingerprint: str) -> bool:
    """Brings a fresh run to where `keep` left it; False where nothing was left, or by a run on other activations.

    Raises:
        StorageError: what lies there belongs to a run of another shape or length.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return False
    tensors, metadata = _load(path)
    place = json.loads(metadata["place"])
    if _fitted_on_others(path, place, fingerprint):
        return False
    shapes = {name: tuple(tensors[f"weight/{name}"].shape) for name in training.parameters}
    expected = {name: tuple(tensor.shape) for name, tensor in training.parameters.items()}
    if shapes != expected or place["n_steps"] != training.plan.steps:
        raise StorageError(f"{path} is of a run of {place['n_steps']} steps with weights {shapes}; expected "
                           f"{training.plan.steps} steps with {expected}; delete it to train anew")  # fmt: skip
    with torch.no_grad():
        for name, tensor in training.parameters.items():
            tensor.copy_(tensors[f"weight/{name}"])
            if f"{MOMENTS[0]}/{name}" in tensors:
                state = {moment: tensors[f"{moment}/{name}"].to(tensor.device) for moment in MOMENTS}
                training.optimizer.state[tensor] = state | {"step": torch.tensor(float(place["done"]), device=tensor.device)}
    training.silent_F = tensors["silent"].to(training.silent_F.device)
    for name in PLACE:
        setattr(training, name, place[name])
    return True


def save(crosscoder: Crosscoder, folder: Path, facts: dict[str, Any]) -> None:
    """Writes a finished crosscoder and removes the checkpoint; `facts`, of which `activations`, go into its config."""
    config = {
        "threshold": crosscoder.threshold,
        "scale_base": crosscoder.scale_M[0],
        "scale_tuned": crosscoder.scale_M[1],
        "owner": crosscoder.partition.owner_F.tolist(),
        "shared_sparsity": crosscoder.partition.shared_sparsity,
        **facts,
    }
    _save({name: tensor.detach() for name, tensor in crosscoder.parameters().items()}, folder / WEIGHTS, {})
    unfinished = folder / f"{CONFIG}.part"
    unfinished.write_text(json.dumps(config, indent=1) + "\n")
    unfinished.replace(folder / CONFIG)
    (folder / CHECKPOINT).unlink(missing_ok=True)


def load(folder: Path, device: Any = "cpu", fingerprint: str | None = None) -> tuple[Crosscoder, dict[str, Any]] | None:
    """A finished crosscoder with its config; None where there is none, or none of the activations of this fingerprint."""
    if not (folder / CONFIG).exists():
        return None
    config = json.loads((folder / CONFIG).read_text())
    if fingerprint is not None and _fitted_on_others(folder / CONFIG, config, fingerprint):
        (folder / CONFIG).unlink()  # else it could stand beside the weights of the next one
        return None
    named = {name: tensor.to(device) for name, tensor in _load(folder / WEIGHTS)[0].items()}
    partition = Partition(np.asarray(config["owner"], np.int8), config["shared_sparsity"])
    scale_M = (config["scale_base"], config["scale_tuned"])
    return Crosscoder.of_parameters(named, partition, scale_M, config["threshold"]), config


def _fitted_on_others(path: Path, facts: dict[str, Any], fingerprint: str) -> bool:
    found = facts.get("activations")
    if found != fingerprint:
        logger.info("%s was fitted on stored activations %s, which are now %s: training anew", path, found, fingerprint)
    return found != fingerprint


def _save(tensors: dict[str, Any], path: Path, metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.part")
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, unfinished, metadata or None)
    unfinished.replace(path)


def _load(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise StorageError(f"{path} cannot be read ({error}); delete it to train anew") from error
