"""One crosscoder for one layer: set up from the data, trained or taken up again, given its threshold, and kept on disk."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from diffing_core.activation_pairs import PairedActivations
from diffing_core.interrupts import held_interrupts
from diffing_core.methods.crosscoder import checkpoint
from diffing_core.methods.crosscoder.data import Batches, Sample, pieces
from diffing_core.methods.crosscoder.model import Crosscoder
from diffing_core.methods.crosscoder.partition import Partition
from diffing_core.methods.crosscoder.settings import CrosscoderSettings
from diffing_core.methods.crosscoder.threshold import calibrated_threshold
from diffing_core.methods.crosscoder.training import Losses, Plan, Training, train
from diffing_core.progress import Advance, track

CALIBRATION_TOKENS = 2**15
MEASURE_EVERY = 10  # steps between two looks at the device


class Fitted(NamedTuple):
    """A finished crosscoder, the sample it was set up with, its plan, and the log of its training."""

    crosscoder: Crosscoder
    sample: Sample
    plan: Plan
    log: list[dict[str, float]]


def fit(stored: PairedActivations, settings: CrosscoderSettings, folder: Path, device: Any) -> Fitted:
    """Trains on those of the chosen rows that are not held out; one that lies finished in the folder is not trained again.

    Unless it was fitted on other bytes than are stored now.
    """
    activations = stored.of(replace(stored.selection, part="fit"))
    sample = Sample.of(activations, seed=settings.seed)
    n_tokens = activations.count()
    n_latents = settings.n_latents(stored.d_model, n_tokens)
    plan = settings.plan(stored.d_model, n_latents, n_tokens)
    fingerprint = activations.fingerprint
    found = checkpoint.load(folder, device, fingerprint)
    if found is not None:
        crosscoder, config = found
        return Fitted(crosscoder, sample, plan, config["log"])
    scale_M = sample.scale_M(settings.input_scale == "common")
    start = Crosscoder.initial(
        Partition.of(settings.partition, n_latents, settings.partition_share, settings.paid_by_shared),
        [mean_D.to(device) * scale for mean_D, scale in zip(sample.mean_MD, scale_M, strict=True)],
        scale_M,
        settings.seed,
    )
    training = Training(start, plan, tuple(v * s**2 for v, s in zip(sample.variance_M, scale_M, strict=True)))
    batches = Batches(activations, settings.rows_per_batch(n_tokens), settings.seed)
    checkpoint.resume(training, folder, fingerprint)
    finished = False
    with held_interrupts() as act:
        try:
            trained(training, batches, lambda: checkpoint.keep(training, folder, fingerprint), act, settings)
            finish(training, sample, folder, fingerprint)
            finished = True
        finally:
            if training.whole and not finished:
                checkpoint.keep(training, folder, fingerprint)
    return Fitted(training.crosscoder, sample, plan, training.log)


def trained(
    training: Training, batches: Batches, keep: Callable[[], None], act: Callable[[], None], settings: CrosscoderSettings
) -> None:
    """Runs the training to its end; keeps it now and then, and lets interrupts act between steps, when all is logged."""
    log_every = max(1, training.plan.steps // settings.log_rows)

    def after(training: Training, losses: Losses) -> None:
        if training.done % log_every == 0 or training.done == training.plan.steps:
            training.log.append(_log_row(training, losses))
        _tell(advance, training, losses)
        if training.done % settings.checkpoint_every == 0 and training.done < training.plan.steps:
            keep()
        if training.done < training.plan.steps:  # after the last step it is finished first
            act()

    with track(training.plan.steps, "steps", "crosscoder", training.done) as advance:
        train(training, batches, after)


def finish(training: Training, sample: Sample, folder: Path, fingerprint: str) -> None:
    """Gives the trained crosscoder its threshold, drops its gradients, and writes it."""
    training.optimizer.zero_grad(set_to_none=True)
    crosscoder, plan = training.crosscoder, training.plan
    if plan.sparsity == "batch_topk":
        crosscoder.threshold = calibrated_threshold(crosscoder, pieces(sample.rows, 2048, CALIBRATION_TOKENS), plan.k)
    facts = {"k": plan.k, "sparsity": plan.sparsity, "n_steps": plan.steps, "activations": fingerprint, "log": training.log}
    checkpoint.save(crosscoder, folder, facts)


def _log_row(training: Training, losses: Losses) -> dict[str, float]:
    plan, step = training.plan, training.done
    return {
        "step": step,
        **training.measures(losses)._asdict(),
        "k": plan.k_at(step - 1),
        "learning_rate": plan.rate_at(step - 1),
    }


def _tell(advance: Advance, training: Training, losses: Losses) -> None:
    """Numbers are fetched from the device now and then only: each time it is waited for."""
    if training.done % MEASURE_EVERY and training.done < training.plan.steps:
        advance(1)
        return
    seen = training.measures(losses)
    fvu = (seen.fvu_base + seen.fvu_tuned) / 2
    advance(1, loss=seen.loss, fvu=fvu, l0=seen.l0, dead_share=seen.dead_share)

