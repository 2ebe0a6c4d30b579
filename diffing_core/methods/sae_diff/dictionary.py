"""A trained sparse autoencoder, in the units of the activations that it reads, and its file.

    f = ReLU(W (x − c) + b), kept where f > θ        x̂ = f D + c        ‖d_j‖ = 1

Training sees scaled rows x' = (x − μ) g; μ and g are folded into c, b and θ, so that whoever loads the file needs
no normaliser. The file holds the tensors under the names of dictionary-learning's BatchTopKSAE, which loads it too.

Suffixes: N rows, D model width, F latents.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from diffing_core.lazy import torch
from diffing_core.sums import Moments

ENCODED_TOGETHER = 2**22  # activations of latents held at a time


@dataclass(frozen=True)
class Scaling:
    """x' = (x − mean) · factor: mean zero and total variance one, whatever the layer; float64 statistics of one fit."""

    mean_D: np.ndarray
    variance: float

    @classmethod
    def of(cls, moments: Moments) -> Self:
        """From the mean and the total variance of the rows that are trained on."""
        return cls(moments.mean_D, float(moments.variance_D().sum()))

    @property
    def factor(self) -> float:
        """One scalar, so that relative variances of dimensions are kept."""
        return self.variance**-0.5

    def apply(self, rows_ND: Any) -> Any:
        """Scaled rows, float32."""
        return (rows_ND.float() - torch.from_numpy(self.mean_D).to(rows_ND.device, torch.float32)) * self.factor


@dataclass(frozen=True)
class Dictionary:
    """Encoder [F, D], its bias [F], unit decoder directions [F, D], centre [D], threshold and k; float32."""

    encoder_FD: Any
    bias_F: Any
    decoder_FD: Any
    centre_D: Any
    threshold: float
    k: int

    @classmethod
    def folded(cls, state: dict[str, Any], scaling: Scaling) -> Self:
        """Of a BatchTopKSAE's state that was trained on scaled rows."""
        state = {name: tensor.detach().cpu().double() for name, tensor in state.items()}
        size = 1 / scaling.factor
        return cls(
            encoder_FD=state["encoder.weight"].float().contiguous(),
            bias_F=(state["encoder.bias"] * size).float(),
            decoder_FD=state["decoder.weight"].T.float().contiguous(),
            centre_D=(torch.from_numpy(scaling.mean_D) + state["b_dec"] * size).float(),
            threshold=float((state["threshold"] * size).float()),
            k=int(state["k"]),
        )

    def calibrated(self, rows_ND: Any) -> "Dictionary":
        """The same with the threshold that lets k latents per row fire on these rows; as many as can where they are fewer.

        The trainer's own threshold lags behind the decoder, by more the shorter the run.
        """
        dense_V = self._dense(rows_ND).flatten()
        largest_V = dense_V.topk(min(self.k * len(rows_ND) + 1, len(dense_V)), sorted=False).values
        return replace(self, threshold=float(largest_V.min()))

    def encode(self, rows_ND: Any) -> Any:
        """Activations [N, F], in the rows' unit."""
        dense_NF = self._dense(rows_ND)
        return dense_NF * (dense_NF > self.threshold)

    def decode(self, active_NF: Any) -> Any:
        """Reconstructions [N, D]."""
        return torch.addmm(self.centre_D, active_NF, self.decoder_FD)

    def encoded(self, rows_ND: Any) -> Iterator[tuple[slice, Any]]:
        """Places and activations of pieces of the rows, so that at most ENCODED_TOGETHER numbers are held."""
        piece = max(1, ENCODED_TOGETHER // len(self.bias_F))
        for start in range(0, len(rows_ND), piece):
            place = slice(start, start + piece)
            yield place, self.encode(rows_ND[place])

    def _dense(self, rows_ND: Any) -> Any:
        return torch.relu(torch.addmm(self.bias_F, rows_ND.float() - self.centre_D, self.encoder_FD.T))

    def only(self, latent_X: np.ndarray) -> "Dictionary":
        """The dictionary of the chosen latents, in their order."""
        at_X = torch.from_numpy(latent_X.copy()).to(self.bias_F.device)
        rows = (each[at_X] for each in (self.encoder_FD, self.bias_F, self.decoder_FD))
        return Dictionary(*rows, self.centre_D, threshold=self.threshold, k=self.k)

    def to(self, device: Any) -> "Dictionary":
        """The same on another device."""
        tensors = (each.to(device) for each in (self.encoder_FD, self.bias_F, self.decoder_FD, self.centre_D))
        return Dictionary(*tensors, threshold=self.threshold, k=self.k)

    def save(self, file: Path, config: dict[str, Any]) -> None:
        """Writes safetensors, and beside it the configuration as JSON; the weights last, in one move."""
        from safetensors.torch import save_file

        aside = file.with_suffix(".part")
        save_file(
            {
                "encoder.weight": self.encoder_FD.cpu(),
                "encoder.bias": self.bias_F.cpu(),
                "decoder.weight": self.decoder_FD.cpu().T.contiguous(),
                "b_dec": self.centre_D.cpu(),
                "threshold": torch.tensor(self.threshold),
                "k": torch.tensor(self.k, dtype=torch.int32),
            },
            aside,
        )
        file.with_suffix(".json").write_text(json.dumps(config, indent=1) + "\n")
        os.replace(aside, file)

    @classmethod
    def load(cls, file: Path) -> tuple[Self, dict[str, Any]]:
        """What `save` wrote."""
        from safetensors.torch import load_file

        state = load_file(file)
        dictionary = cls(
            encoder_FD=state["encoder.weight"],
            bias_F=state["encoder.bias"],
            decoder_FD=state["decoder.weight"].T.contiguous(),
            centre_D=state["b_dec"],
            threshold=float(state["threshold"]),
            k=int(state["k"]),
        )
        return dictionary, json.loads(file.with_suffix(".json").read_text())
