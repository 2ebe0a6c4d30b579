"""Training one autoencoder on one target among the stored activations: difference, base or tuned.

The trainer is dictionary-learning's; the loop is ours, because `trainSAE` can neither go on from a checkpoint nor be
interrupted between steps, and imports wandb. Two more of its habits are left out: `update(0, …)` puts the geometric
median of the first batch into the decoder's bias, which divides by zero where most rows are equal (rows are centred
here), so steps are counted from 1; and the seed of the whole process is left alone.

Suffixes: N rows, D model width, F latents.
"""

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffing_core.activation_pairs import PairedActivations, PairedRows
from diffing_core.interrupts import held_interrupts
from diffing_core.lazy import torch
from diffing_core.methods.sae_diff.checkpoint import check_same, load_checkpoint, save_checkpoint, trained_on_others
from diffing_core.methods.sae_diff.dictionary import Dictionary, Scaling
from diffing_core.methods.sae_diff.plan import Plan
from diffing_core.progress import track
from diffing_core.sums import Moments

MEASURED_ROWS = 2048
LOG_ROWS = 10
CHECKPOINT_STEPS = 1000


@dataclass(frozen=True)
class Material:
    """What an autoencoder is trained on: `target` (difference, base or tuned) of the chosen rows at one layer."""

    rows: PairedActivations
    layer: int
    target: str

    @property
    def name(self) -> str:
        """Of its files, and in progress lines."""
        return f"layer_{self.layer}.{self.target}"

    def vectors(self, rows: PairedRows) -> Any:
        """The target, float32 [N, D]."""
        return getattr(rows, f"{self.target}_ND").float()

    def part(self, part: str) -> PairedActivations:
        """The rows to fit on, or those held out."""
        return self.rows.of(replace(self.rows.selection, part=part))

    def moments(self) -> Moments:
        """Mean and variance of the rows to fit on, float64."""
        moments = Moments(self.rows.d_model)
        for rows in self.part("fit").blocks():
            moments.add(self.vectors(rows).numpy())
        return moments

    def some(self, part: str) -> Any:
        """At most MEASURED_ROWS vectors of a part, drawn from a whole pool of mixed corpora; None where it has no rows."""
        first = next(self.part(part).shuffled(MEASURED_ROWS, seed=0), None)
        return None if first is None else self.vectors(first)


@dataclass(frozen=True)
class Trained:
    """An autoencoder with what it was trained by, and its log: a row per measurement."""

    dictionary: Dictionary
    config: dict[str, Any]
    log: list[dict[str, float]]


def trained(material: Material, plan: Plan, scaling: Scaling, folder: Path, device: Any) -> Trained:
    """Trains, goes on from a checkpoint, or loads what the folder holds already.

    What was trained on other bytes than are stored now is trained anew.

    Raises:
        StorageError: what the folder holds is of a training with other settings.
    """
    file = folder / f"{material.name}.safetensors"
    config = {
        "target": material.target,
        "layer": material.layer,
        "activations": material.rows.fingerprint,
        **plan.config(),
        "mean": scaling.mean_D.tolist(),
        "variance": scaling.variance,
    }
    if file.exists() and trained_on_others(file, Dictionary.load(file)[1], config):
        file.unlink()
    if not file.exists():
        _train(_Run(material, plan, scaling, config, folder, device), file)
    dictionary, found = Dictionary.load(file)
    log = found.pop("log")
    check_same(file, found, config)
    return Trained(dictionary, config, log)


class _Run:
    """One training between two steps: trainer, step, log."""

    def __init__(
        self, material: Material, plan: Plan, scaling: Scaling, config: dict[str, Any], folder: Path, device: Any
    ) -> None:
        self.material, self.plan, self.scaling, self.config = material, plan, scaling, config
        self.checkpoint = folder / f"{material.name}.checkpoint.safetensors"
        self.trainer = plan.trainer(device)
        self.step, self.log = 0, []
        if self.checkpoint.exists():
            self.step, self.log = load_checkpoint(self.checkpoint, self.trainer, self.config)
        held_ND = material.some("held_out")
        self._held_ND = None if held_ND is None else scaling.apply(held_ND.to(device))
        self.measured = self._latest()

    def batches(self) -> Any:
        """What is left of the batches, in the order that the seed decides."""
        every = self.material.part("fit").shuffled(self.plan.batch_rows, seed=self.plan.seed, epochs=None)
        return itertools.islice(every, self.step, self.plan.steps)

    def take_step(self, rows: PairedRows) -> float:
        """One update; gives its loss and logs it now and then."""
        x_ND = self.scaling.apply(self.material.vectors(rows).to(self.trainer.device))
        loss = self.trainer.update(self.step + 1, x_ND)
        self.step += 1
        every = max(1, self.plan.steps // LOG_ROWS)
        if self.step % every == 0 or self.step == self.plan.steps:
            self.log.append({"step": self.step, "loss": loss, "n_dead": self.trainer.dead_features, **self._measure()})
            self.measured = self._latest()
        return loss

    def save(self) -> None:
        """Writes the checkpoint."""
        save_checkpoint(self.checkpoint, self.trainer, self.step, self.log, self.config)

    def _latest(self) -> dict[str, float]:
        last = self.log[-1] if self.log else {}
        return {name: last[name] for name in ("fvu", "l0", "dead_share") if last.get(name) is not None}

    def _measure(self) -> dict[str, float | None]:
        """FVU, L0 and dead share on the held-out sample; batch top-k decides what fires while there is no threshold."""
        ae, x_ND = self.trainer.ae, self._held_ND
        threshold = float(ae.threshold) * self.scaling.variance**0.5 if ae.threshold >= 0 else None
        if x_ND is None:
            return {"fvu": None, "l0": None, "dead_share": None, "threshold": threshold}
        with torch.no_grad():
            active_NF = ae.encode(x_ND, use_threshold=threshold is not None)
            residual_ND = x_ND - ae.decode(active_NF)
            fires_NF = active_NF > 0
            return {
                "fvu": float(residual_ND.square().sum() / (x_ND - x_ND.mean(0)).square().sum().clamp(min=1e-30)),
                "l0": float(fires_NF.sum() / len(x_ND)),
                "dead_share": 1 - float(fires_NF.any(0).float().mean()),
                "threshold": threshold,
            }


def _train(run: _Run, file: Path) -> None:
    """Trains to the end and writes the weights, or leaves a checkpoint after the last whole step."""
    whole = finished = False
    with held_interrupts() as act:
        try:
            with track(run.plan.steps, "steps", f"SAE {run.material.name}", run.step) as advance:
                whole = True
                for rows in run.batches():
                    act()
                    whole = False
                    loss = run.take_step(rows)
                    whole = True
                    advance(1, loss=loss, **run.measured)
                    if run.step % CHECKPOINT_STEPS == 0:
                        run.save()
            dictionary = Dictionary.folded(run.trainer.ae.state_dict(), run.scaling).calibrated(run.material.some("fit"))
            dictionary.save(file, run.config | {"log": run.log})
            finished = True
            run.checkpoint.unlink(missing_ok=True)
        finally:
            if whole and not finished:
                run.save()
