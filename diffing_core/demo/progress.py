"""What a running build tells whoever watches it."""

from dataclasses import dataclass, replace

from diffing_core.demo.tiers import Schedule


@dataclass(frozen=True)
class Progress:
    """State of one training: steps done, loss in nats per token, rate and remaining wall time."""

    step: int
    n_steps: int
    loss_nats: float
    tokens_per_s: float
    remaining_s: float
    artifact: str = ""

    @classmethod
    def after(cls, step: int, schedule: Schedule, elapsed_s: float, loss_nats: float) -> "Progress":
        """Return the progress of a training that has done `step` steps in `elapsed_s` seconds."""
        tokens = step * schedule.batch_size * schedule.context_tokens
        remaining_s = elapsed_s / step * (schedule.steps - step)
        return cls(step, schedule.steps, loss_nats, tokens / elapsed_s, remaining_s)

    def of(self, artifact: str) -> "Progress":
        """Return this progress with the name of the artifact it belongs to."""
        return replace(self, artifact=artifact)

    def __str__(self) -> str:
        return (
            f"{self.artifact}: step {self.step}/{self.n_steps}, loss {self.loss_nats:.2f} nats, "
            f"{self.tokens_per_s:,.0f} tokens/s, {self.remaining_s:.0f} s left"
        )
