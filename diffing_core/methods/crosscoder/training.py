"""Training: Adam on the reconstruction of both models, with dead latents drawn to what is left unexplained.

    loss = [Σ_m mean ‖x_m − x̂_m‖² + λ √D mean Σ_j f_j Σ_m ‖d_j^m‖ sparsity_j] / V  +  α · aux        V: both models' variance
    aux  = Σ_m ‖ε_m − ε̂_m‖² / Σ_m ‖ε_m‖²         ε = x − x̂, held fixed; ε̂ by the best dead latents, without a bias

λ is zero with BatchTopK. Errors are squared, as in the paper (its code averages norms). So that a latent can come
back whose code is zero everywhere, `aux` reads the code before its ReLU: after it there would be no gradient.
A latent is dead when it has not been active for `dead_after_steps` batches.

Suffixes: M models, N tokens, D width, F latents, X dead latents.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from diffing_core.lazy import torch
from diffing_core.methods.crosscoder.model import Crosscoder, Pair, Sparsity, keep_largest

BETAS = (0.9, 0.999)
CLIP = 1.0
DECAY_SHARE = 0.2  # of the steps, at their end
Epochs = Callable[[int], Iterator[Pair]]  # the batches of one epoch, as raw activations of both models


@dataclass(frozen=True)
class Plan:
    """How long and how fast is learned; numbers of steps, not of tokens.

    `k` is annealed down to from `k_start` over `annealing_steps`; `l1` is λ, a share of the mean activation's length.
    """

    steps: int
    learning_rate: float
    k: float
    sparsity: Sparsity = "batch_topk"
    l1: float = 0.0
    warm_up_steps: int = 0
    k_start: float = 0.0
    annealing_steps: int = 0
    aux_weight: float = 1 / 32
    dead_after_steps: int = 100

    def k_at(self, step: int) -> float:
        """Latents per token kept at this step."""
        if step >= self.annealing_steps or self.k_start <= self.k:
            return self.k
        return self.k_start + (self.k - self.k_start) * step / self.annealing_steps

    def rate_at(self, step: int) -> float:
        """Learning rate: linear up, level, linear down to the end."""
        up = (step + 1) / (self.warm_up_steps + 1)
        down = (self.steps - step) / max(DECAY_SHARE * self.steps, 1)
        return self.learning_rate * min(up, 1.0, down)


class Measures(NamedTuple):
    """Of one batch; `dead_share` after it. `fvu` is over the batch's own tokens, its variance the sample's."""

    loss: float
    aux_loss: float
    fvu_base: float
    fvu_tuned: float
    l0: float
    dead_share: float


class Losses(NamedTuple):
    """The terms as tensors, so that each can be told apart and differentiated."""

    total: Any
    aux: Any
    squared_error_M: list[Any]
    code_NF: Any


@dataclass
class Training:
    """The state of a run: weights, Adam's moments, and for how many batches each latent has been silent.

    `done` steps are behind it; next comes batch `batch` of epoch `epoch`. Where it is not `whole`, a step has failed
    halfway, and it must not be kept.
    """

    crosscoder: Crosscoder
    plan: Plan
    variance_M: tuple[float, float]
    done: int = 0
    epoch: int = 0
    batch: int = 0
    whole: bool = True
    log: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        device = self.crosscoder.bias_F.device
        named = self.crosscoder.parameters()
        self.parameters = {name: tensor.detach().requires_grad_() for name, tensor in named.items()}
        self.crosscoder = Crosscoder.of_parameters(self.parameters, self.crosscoder.partition, self.crosscoder.scale_M)
        self.silent_F = torch.zeros(self.crosscoder.n_latents, dtype=torch.int64, device=device)
        self.optimizer = torch.optim.Adam(list(self.parameters.values()), betas=BETAS, fused=device.type != "mps")
        self._allowed_MF = torch.from_numpy(self.crosscoder.partition.allowed_MF).to(device).float()
        self._sparsity_F = torch.from_numpy(self.crosscoder.partition.sparsity_F).to(device)
        self._tied = torch.from_numpy(np.flatnonzero(self.crosscoder.partition.tied_F)).to(device)

    @property
    def dead_F(self) -> Any:
        """Latents silent for `dead_after_steps` batches, bool."""
        return self.silent_F >= self.plan.dead_after_steps

    def step(self, activation_MND: Pair) -> Losses:
        """One batch: losses, gradients, Adam."""
        with torch.enable_grad():
            losses = self.losses(self.crosscoder.scaled(activation_MND))
            self.optimizer.zero_grad(set_to_none=True)
            losses.total.backward()
        self._constrain()
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate_at(self.done)
        self.whole = False
        self.optimizer.step()
        active_F = (losses.code_NF.detach() > 0).any(0)
        self.silent_F = torch.where(active_F, 0, self.silent_F + 1)
        self.done += 1
        self.batch += 1
        self.whole = True
        return losses

    def losses(self, scaled_MND: Pair) -> Losses:
        """The loss of one batch and its parts, at the present step."""
        crosscoder, plan = self.crosscoder, self.plan
        drive_NF = crosscoder.drive(scaled_MND)
        code_NF = drive_NF.relu()
        if plan.sparsity == "batch_topk":
            code_NF = keep_largest(code_NF, crosscoder.cost_F(), plan.k_at(self.done))
        decoded_MND = crosscoder.decode(code_NF.clone())  # so that both sides' gradients are added before any other
        error_MND = [x_ND - y_ND for x_ND, y_ND in zip(scaled_MND, decoded_MND, strict=True)]
        squared_error_M = [error_ND.square().sum() / len(error_ND) for error_ND in error_MND]
        total = squared_error_M[0] + squared_error_M[1]
        if plan.sparsity == "l1":
            norm_F = crosscoder.cost_F() * self._sparsity_F
            paid = (code_NF * (norm_F * self._sparsity_F)).sum() / len(code_NF)
            total = total + plan.l1 * error_MND[0].shape[1] ** 0.5 * paid
        aux = self._aux_loss(drive_NF, [error_ND.detach() for error_ND in error_MND])
        return Losses(total / max(sum(self.variance_M), 1e-30) + plan.aux_weight * aux, aux, squared_error_M, code_NF)

    def measures(self, losses: Losses) -> Measures:
        """Numbers of a batch, fetched from the device."""
        fvu_M = [
            float(squared.detach()) / max(variance, 1e-30)
            for squared, variance in zip(losses.squared_error_M, self.variance_M, strict=True)
        ]
        l0 = float((losses.code_NF > 0).sum()) / len(losses.code_NF)
        return Measures(float(losses.total.detach()), float(losses.aux.detach()), *fvu_M, l0, float(self.dead_F.float().mean()))

    def _aux_loss(self, drive_NF: Any, error_MND: Pair) -> Any:
        """Share of the error that the D/2 best dead latents leave; zero without dead latents or without error."""
        dead_X = self.dead_F.nonzero().squeeze(1)
        size = error_MND[0].square().sum() + error_MND[1].square().sum()
        if not len(dead_X) or not self.plan.aux_weight or not float(size):
            return size.new_zeros(())
        decoder_MXD = [decoder_FD[dead_X] for decoder_FD in self.crosscoder.decoder_MFD]
        drive_NX = drive_NF[:, dead_X]
        n_best = max(1, error_MND[0].shape[1] // 2)
        if len(dead_X) > n_best:
            norm_X = (decoder_MXD[0].norm(dim=1) + decoder_MXD[1].norm(dim=1)).detach()
            best_NK = (drive_NX.detach() * norm_X).topk(n_best, dim=1, sorted=False).indices
            drive_NX = drive_NX * torch.zeros_like(drive_NX).scatter_(1, best_NK, 1.0)
        left_M = [
            (error_ND - drive_NX @ decoder_XD).square().sum()
            for error_ND, decoder_XD in zip(error_MND, decoder_MXD, strict=True)
        ]
        return (left_M[0] + left_M[1]) / size

    def _constrain(self) -> None:
        """Gradients as the partition allows them, and of norm CLIP at most."""
        encoders, decoders = self.crosscoder.encoder_MDF, self.crosscoder.decoder_MFD
        for encoder_DF, decoder_FD, allowed_F in zip(encoders, decoders, self._allowed_MF, strict=True):
            encoder_DF.grad *= allowed_F
            decoder_FD.grad *= allowed_F[:, None]
        if len(self._tied):
            mean_XD = (decoders[0].grad[self._tied] + decoders[1].grad[self._tied]) / 2
            for decoder_FD in decoders:
                decoder_FD.grad[self._tied] = mean_XD
        squares = {name: parameter.grad.square().sum() for name, parameter in self.parameters.items()}
        pairs = [squares[f"{part}.base"] + squares[f"{part}.tuned"] for part in ("encoder", "decoder", "decoder_bias")]
        norm = (squares["bias"] + pairs[0] + pairs[1] + pairs[2]).sqrt()  # paired, so that sides can be exchanged
        shrink = (CLIP / norm.clamp(min=CLIP)).clamp(max=1.0)
        for parameter in self.parameters.values():
            parameter.grad *= shrink


def train(training: Training, epochs: Epochs, after: Callable[[Training, Losses], None]) -> None:
    """Goes on from where `training` stands to the end of its plan; `after` is called after every step.

    Raises:
        ValueError: an epoch has no batch.
    """
    while training.done < training.plan.steps:
        number = -1
        for number, activation_MND in enumerate(epochs(training.epoch)):
            if number < training.batch:
                continue
            after(training, training.step(activation_MND))
            if training.done == training.plan.steps:
                return
        if number < 0:
            raise ValueError(f"epoch {training.epoch} has no batch; expected at least one")
        training.epoch, training.batch = training.epoch + 1, 0
