"""The crosscoder: one sparse code that reads both models' activations and writes both.

    f  = ReLU(Σ_m x_m W_enc^m + b)          x_m = scale_m h_m
    x̂_m = f D^m + b_dec^m                   score s_j = f_j Σ_m ‖d_j^m‖ / sparsity_j

BatchTopK keeps the N·k largest scores of a batch while training, and whatever is above the threshold θ afterwards;
the kept value is f. With L1 every positive value stays. Decoder norms carry the meaning, so none is normalised; they
are reported in units of the activations (`directions`), hence do not depend on the scales.

Base and tuned are stored apart and treated alike, operation by operation: with equal inputs their weights stay equal
to the last bit, and exchanging the two models exchanges the weights.

Suffixes: M models (0 base, 1 tuned), N tokens, D width, F latents.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from diffing_core.lazy import torch
from diffing_core.methods.crosscoder.partition import Partition
from diffing_core.sparse_code import SparseCode, mask_of_largest

Sparsity = Literal["batch_topk", "l1"]
SIDES = ("base", "tuned")
Pair = Sequence[Any]  # one tensor per model


@dataclass
class Crosscoder:
    """Weights, as lists of one tensor per model where models have their own; `threshold` is θ."""

    partition: Partition
    scale_M: tuple[float, float]
    encoder_MDF: list[Any]
    decoder_MFD: list[Any]
    decoder_bias_MD: list[Any]
    bias_F: Any
    threshold: float = 0.0

    @classmethod
    def initial(cls, partition: Partition, mean_MD: Pair, scale_M: tuple[float, float], seed: int) -> "Crosscoder":
        """Random decoder directions of unit norm, the same in both models; encoder their transpose; biases the means.

        Args:
            mean_MD: mean of the scaled activations.
        """
        draw = torch.Generator().manual_seed(seed)
        width, device = len(mean_MD[0]), mean_MD[0].device
        unit_FD = torch.nn.functional.normalize(torch.randn(len(partition.owner_F), width, generator=draw), dim=1).to(device)
        allowed_MF1 = torch.from_numpy(partition.allowed_MF).to(unit_FD)[:, :, None]
        decoder_MFD = [unit_FD * allowed_F1 for allowed_F1 in allowed_MF1]
        encoder_MDF = [decoder_FD.T.contiguous() for decoder_FD in decoder_MFD]
        bias_F = -sum(mean_D @ encoder_DF for mean_D, encoder_DF in zip(mean_MD, encoder_MDF, strict=True))
        return cls(partition, scale_M, encoder_MDF, decoder_MFD, [each.clone() for each in mean_MD], bias_F)

    @property
    def n_latents(self) -> int:
        """F."""
        return len(self.bias_F)

    def parameters(self) -> dict[str, Any]:
        """Every trained tensor by its name in a file."""
        named: dict[str, Any] = {"bias": self.bias_F}
        for place, side in enumerate(SIDES):
            named |= {
                f"encoder.{side}": self.encoder_MDF[place],
                f"decoder.{side}": self.decoder_MFD[place],
                f"decoder_bias.{side}": self.decoder_bias_MD[place],
            }
        return named

    @classmethod
    def of_parameters(
        cls, named: Mapping[str, Any], partition: Partition, scale_M: tuple[float, float], threshold: float = 0.0
    ) -> "Crosscoder":
        """The inverse of `parameters`."""
        encoder, decoder, bias = (
            [named[f"{part}.{side}"] for side in SIDES] for part in ("encoder", "decoder", "decoder_bias")
        )
        return cls(partition, scale_M, encoder, decoder, bias, named["bias"], threshold)

    def scaled(self, activation_MND: Pair) -> list[Any]:
        """x_m of h_m, float32 where the weights lie."""
        return [
            (activation_ND.to(self.bias_F.device).float() * scale).contiguous()
            for activation_ND, scale in zip(activation_MND, self.scale_M, strict=True)
        ]

    def drive(self, scaled_MND: Pair) -> Any:
        """Σ_m x_m W_enc^m + b, [N, F]: the code before its ReLU."""
        base_NF, tuned_NF = (x_ND @ encoder_DF for x_ND, encoder_DF in zip(scaled_MND, self.encoder_MDF, strict=True))
        return base_NF + tuned_NF + self.bias_F

    def cost_F(self) -> Any:
        """What a unit of a latent's code counts in its score: Σ_m ‖d_j^m‖ / sparsity_j."""
        base_F, tuned_F = (decoder_FD.norm(dim=1) for decoder_FD in self.decoder_MFD)
        return (base_F + tuned_F) / torch.from_numpy(self.partition.sparsity_F).to(base_F)

    def encode(self, activation_MND: Pair) -> Any:
        """The code of raw activations, [N, F]: values whose score is above θ. Does not depend on other tokens."""
        with torch.no_grad():
            drive_NF = self.drive(self.scaled(activation_MND))
            return drive_NF.mul_(drive_NF > self.bound_F())

    def sparse(self, scaled_MND: Pair) -> SparseCode:
        """The entries of `encode`, of scaled activations, without its dense array."""
        with torch.no_grad():
            drive_NF = torch.addmm(self.bias_F, scaled_MND[0], self.encoder_MDF[0]).addmm_(scaled_MND[1], self.encoder_MDF[1])
            return SparseCode.above(drive_NF, self.bound_F())

    def bound_F(self) -> Any:
        """The code's value above which a latent is active: θ over its cost; a latent without a decoder never is."""
        cost_F = self.cost_F().detach()
        return torch.where(cost_F > 0, self.threshold / cost_F, torch.inf)

    def decode(self, code_NF: Any) -> list[Any]:
        """x̂_m, in scaled units."""
        return [
            code_NF @ decoder_FD + bias_D
            for decoder_FD, bias_D in zip(self.decoder_MFD, self.decoder_bias_MD, strict=True)
        ]

    def reconstruct(self, code_NF: Any) -> list[Any]:
        """ĥ_m, in units of the activations."""
        with torch.no_grad():
            return [x_ND / scale for x_ND, scale in zip(self.decode(code_NF), self.scale_M, strict=True)]

    def directions(self) -> list[Any]:
        """d_j^m in units of the activations, float32 [F, D] per model."""
        return [decoder_FD.detach() / scale for decoder_FD, scale in zip(self.decoder_MFD, self.scale_M, strict=True)]

    def only(self, latents: np.ndarray) -> "Crosscoder":
        """The same with these latents alone; their code stays what it was, since a threshold decides for each by itself."""
        chosen = torch.from_numpy(np.asarray(latents, np.int64)).to(self.bias_F.device)
        return Crosscoder(
            Partition(self.partition.owner_F[latents], self.partition.shared_sparsity),
            self.scale_M,
            [encoder_DF.detach()[:, chosen].contiguous() for encoder_DF in self.encoder_MDF],
            [decoder_FD.detach()[chosen] for decoder_FD in self.decoder_MFD],
            [bias_D.detach() for bias_D in self.decoder_bias_MD],
            self.bias_F.detach()[chosen],
            self.threshold,
        )


def keep_largest(code_NF: Any, cost_F: Any, k: float) -> Any:
    """The code with its N·k largest scores, others zero; fewer where fewer are positive. Exactly so many among equals.

    `k` may be a fraction; N·k is rounded, to one at least.
    """
    n_kept = min(max(1, round(len(code_NF) * k)), code_NF.numel())
    with torch.no_grad():
        mask_NF = mask_of_largest(code_NF * cost_F, n_kept)
    return code_NF * mask_NF

