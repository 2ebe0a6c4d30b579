"""Training an autoencoder of differences: our loop over stored activations against dictionary-learning's own."""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from benchmarks.figure import Figure, cpu_s, in_turn
from diffing_core.activation_pairs import PairedActivations, PairedFile
from diffing_core.activation_writer import ActivationWriter
from diffing_core.blocks import TokenBlock
from diffing_core.methods.sae_diff.declaration import SaeDiffSettings
from diffing_core.methods.sae_diff.dictionary import Scaling
from diffing_core.methods.sae_diff.plan import Plan
from diffing_core.methods.sae_diff.training import Material, trained

WIDTH, ROWS, LENGTH, ROUNDS = 256, 65_536, 64, 3


def sae_training() -> list[Figure]:
    """Tokens per second of both loops with one trainer configuration, from the same files, in the same order.

    Ours measures on held-out tokens, writes the file and holds interrupts back meanwhile; theirs does none of it.
    """
    with tempfile.TemporaryDirectory() as folder:
        material = Material(PairedActivations([_stored(Path(folder))]), 0, "difference")
        moments = material.moments()
        plan, scaling = Plan.of(SaeDiffSettings(epochs=1.0), WIDTH, moments.count), Scaling.of(moments)
        loops = {"ours": lambda: _ours(material, plan, scaling), "trainSAE": lambda: _theirs(material, plan, scaling)}
        taken = in_turn(loops, ROUNDS, cpu_s)
    tokens = plan.steps * plan.batch_rows
    parts = {f"{name} (tokens/s)": tokens / seconds for name, seconds in taken.items()}
    parts |= {"tokens": tokens, "width": WIDTH, "latents": plan.n_latents, "k": plan.k}
    return [Figure("sae_training_rate_over_train_sae", taken["trainSAE"] / taken["ours"], "×", 0.9, "higher", parts)]


def _stored(folder: Path) -> PairedFile:
    """Random activations of two models; what is learned of them does not matter."""
    import torch

    index_N = np.arange(ROWS)
    token_N = torch.from_numpy(index_N)
    facts = index_N // LENGTH, index_N % LENGTH, np.zeros(ROWS, np.int8), np.zeros(ROWS, bool)
    for name in ("base", "tuned"):
        writer = ActivationWriter(folder / name, WIDTH, torch.float32, ROWS)
        writer.add(TokenBlock(token_N, token_N, *facts, None, None), torch.randn(ROWS, WIDTH))
        writer.close()
    return PairedFile.open("random", folder / "base", folder / "tuned")


def _ours(material: Material, plan: Plan, scaling: Scaling) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trained(material, plan, scaling, Path(folder), "cpu")


def _theirs(material: Material, plan: Plan, scaling: Scaling) -> None:
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer

    def batches() -> Iterator[Any]:
        for rows in material.part("fit").shuffled(plan.batch_rows, seed=plan.seed, epochs=None):
            yield scaling.apply(material.vectors(rows))

    configuration = {
        "trainer": BatchTopKTrainer,
        "steps": plan.steps,
        "activation_dim": plan.width,
        "dict_size": plan.n_latents,
        "k": plan.k,
        "layer": 0,
        "lm_name": "",
        "warmup_steps": plan.warmup_steps,
        "decay_start": plan.decay_start,
        "threshold_beta": plan.threshold_beta,
        "threshold_start_step": plan.threshold_start,
        "seed": plan.seed,
        "device": "cpu",
    }
    train_sae()(batches(), [configuration], plan.steps, device="cpu")


def train_sae() -> Any:
    """Their loop; its module imports wandb, which it only calls when told to log there, so an empty module will do."""
    sys.modules.setdefault("wandb", ModuleType("wandb"))
    from dictionary_learning.training import trainSAE

    return trainSAE
