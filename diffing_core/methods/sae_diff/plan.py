"""How long and with which schedule one autoencoder is trained: everything that must shrink with a short run.

dictionary-learning's defaults suppose some 10⁵ steps: the inference threshold is first set after step 1000, follows with a
memory of 1000 steps, and a latent counts as dead after 10⁷ tokens. In a run of 300 steps the threshold then stays at −1
(L0 761 where 16 was asked for) and the auxiliary loss never acts. Here each is the smaller of the package's value
and a share of the run.
"""

from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Self

from diffing_core.lazy import torch
from diffing_core.methods.sae_diff.declaration import SaeDiffSettings
from diffing_core.sparse_code import mask_of_largest

PACKAGE_STEPS, PACKAGE_DEAD_TOKENS, PACKAGE_BETA = 1000, 10_000_000, 0.999
FEWEST_STEPS = 20
BATCHES_PER_EPOCH = 100
TOKENS_PER_LATENT = 100


@dataclass(frozen=True)
class Plan:
    """Sizes and lengths; what is derived from them are properties."""

    width: int
    n_latents: int
    k: int
    batch_rows: int
    steps: int
    learning_rate: float | None
    seed: int

    @classmethod
    def of(cls, settings: SaeDiffSettings, width: int, n_rows: int) -> Self:
        """The plan for n_rows rows; small corpora get smaller batches and fewer latents.

        At least BATCHES_PER_EPOCH batches make an epoch, down to a sixteenth of the batch that was asked for, and a
        latent has TOKENS_PER_LATENT tokens to learn from.
        """
        batch_rows = max(1, min(settings.batch_rows, max(settings.batch_rows // 16, n_rows // BATCHES_PER_EPOCH), n_rows))
        k = settings.k or max(4, min(100, width // 16))
        n_latents = max(1, round(min(settings.expansion * width, max(n_rows / TOKENS_PER_LATENT, 2 * k))))
        tokens = min(settings.epochs * n_rows, settings.max_tokens)
        steps = max(FEWEST_STEPS, round(tokens / batch_rows))
        return cls(width, n_latents, min(k, n_latents), batch_rows, steps, settings.learning_rate, settings.seed)

    @property
    def warmup_steps(self) -> int:
        """Steps over which the learning rate rises."""
        return min(PACKAGE_STEPS, self.steps // 10)

    @property
    def decay_start(self) -> int:
        """Step from which it falls to zero."""
        return self.steps * 4 // 5

    @property
    def threshold_start(self) -> int:
        """Step after which the threshold follows the smallest activation that batch top-k keeps."""
        return min(PACKAGE_STEPS, self.steps // 2)

    @property
    def threshold_beta(self) -> float:
        """Its memory: a twentieth of the run, so that at the end it belongs to the decoder of the end."""
        return min(PACKAGE_BETA, 1 - 20 / max(self.steps, 40))

    @property
    def dead_after_tokens(self) -> int:
        """Tokens without firing after which a latent is dead, and trained by the auxiliary loss."""
        return min(PACKAGE_DEAD_TOKENS, self.steps * self.batch_rows // 10)

    def config(self) -> dict[str, Any]:
        """All of it, for the file beside the weights."""
        names = ("warmup_steps", "decay_start", "threshold_start", "threshold_beta", "dead_after_tokens")
        return asdict(self) | {name: getattr(self, name) for name in names}

    def trainer(self, device: Any) -> Any:
        """dictionary-learning's trainer, newly begun; the same weights for the same seed, on any device."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            trainer = _trainer_class()(
                steps=self.steps,
                activation_dim=self.width,
                dict_size=self.n_latents,
                k=self.k,
                dict_class=_quick_autoencoder(),
                layer=0,  # the trainer only writes layer and lm_name down; ours stand in our configuration
                lm_name="",
                lr=self.learning_rate,
                warmup_steps=self.warmup_steps,
                decay_start=self.decay_start,
                threshold_beta=self.threshold_beta,
                threshold_start_step=self.threshold_start,
                device=str(device),
            )
        trainer.dead_feature_threshold = self.dead_after_tokens  # fixed in its constructor
        return trainer


@cache
def _trainer_class() -> type:
    """dictionary-learning's trainer, which would begin its threshold with a plain number where a batch has nothing active: an error."""
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer

    class Trainer(BatchTopKTrainer):
        def update_threshold(self, f: Any) -> None:
            if self.ae.threshold >= 0 or bool((f > 0).any()):
                super().update_threshold(f)

    return Trainer


@cache
def _quick_autoencoder() -> type:
    """dictionary-learning's autoencoder with a faster selection of the same activations, bit by bit."""
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE

    class QuickBatchTopKSAE(BatchTopKSAE):
        def encode(self, x: Any, return_active: bool = False, use_threshold: bool = True) -> Any:
            if use_threshold:
                return super().encode(x, return_active, use_threshold)
            dense_NF = torch.relu(self.encoder(x - self.b_dec))
            active_NF = dense_NF * mask_of_largest(dense_NF.detach(), int(self.k) * len(x))
            return (active_NF, active_NF.sum(0) > 0, dense_NF) if return_active else active_NF

    return QuickBatchTopKSAE
