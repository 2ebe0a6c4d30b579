"""Identity of a result: everything that could change its numbers, in one value."""

from dataclasses import asdict, dataclass, replace

from diffing_core.pairs import Pair
from diffing_core.settings import short_hash


@dataclass(frozen=True)
class RunKey:
    """Who was compared, by which method and settings, on which data.

    Two results share a `run_id` only if every field is equal; variants, adapters in one repository,
    corpora of equal shape and edited settings can therefore never be mistaken for one another. `step` tells
    a method's own result from what was later concluded from it (calibration, hypotheses, grades).
    """

    pair: Pair
    method: str
    version: str
    settings_id: str
    model_revision: str
    adapter_hash: str
    corpus: str = ""
    corpus_hash: str = ""
    step: str = "diff"

    @property
    def run_id(self) -> str:
        """Twelve hex digits over all fields."""
        return short_hash(asdict(self), 12)

    def with_corpus(self, corpus: str, corpus_hash: str) -> "RunKey":
        """The same run over one probe corpus."""
        return replace(self, corpus=corpus, corpus_hash=corpus_hash)

    def columns(self) -> dict[str, str]:
        """The key columns of every stored row."""
        return {
            "organism": self.pair.organism,
            "model": self.pair.model,
            "variant": self.pair.variant,
            "corpus": self.corpus,
            "method": self.method,
            "settings_id": self.settings_id,
            "run_id": self.run_id,
        }
