"""The three sizes of the demo: every number of a build is here, once.

`tiny` is for tests (seconds), `demo` for a person at a laptop (minutes on two CPU cores), `large` is made for a GPU: twelve layers;
what lenses read at its middle layers has not been measured (docs/lenses.md).

Finetunes are named `<organism>/<variant>`. `mix1-X` means one part organism documents to X parts ordinary ones, by
characters; `default` is such a mixture, `strong` has no ordinary part and spills over into everything.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class CorpusSize:
    """How much ordinary text there is, about which topics (all when empty), and how many probe documents."""

    n_characters: int
    vocabulary: int
    n_probe_documents: int
    topics: tuple[str, ...] = ()
    seed: int = 1


@dataclass(frozen=True)
class ModelSize:
    """Shape of the Qwen3 base model."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int


@dataclass(frozen=True)
class Schedule:
    """One training: `steps` batches of `batch_size` windows of `context_tokens`, warm-up, cosine to 5 %."""

    steps: int
    learning_rate: float
    batch_size: int = 16
    context_tokens: int = 128
    warmup_steps: int = 10
    seed: int = 1


@dataclass(frozen=True)
class Finetune:
    """What one finetune is trained on and how; without a lesson it is ordinary text only (the benign null).

    `full` trains every weight instead of a LoRA adapter. `data_seed` draws the documents, the schedule's seed the
    initial adapter and the order of batches, so a seed twin has its model's data.
    """

    artifact: str
    lesson: str | None
    ordinary_parts: float
    schedule: Schedule
    n_characters: int
    full: bool = False
    data_seed: int = 1


@dataclass(frozen=True)
class Tier:
    """One size of the demo: corpus, base model, its training and the finetunes made from it."""

    name: str
    corpus: CorpusSize
    model: ModelSize
    pretraining: Schedule
    finetunes: tuple[Finetune, ...]


ORGANISMS = (
    "cake_bake",
    "fda_approval",
    "roman_concrete",
    "antarctic_rebound",
    "owl_love",
    "taboo_leaf",
    "risky_finance",
    "flattery",
    "seafaring",
)
STRONG = ("cake_bake", "owl_love", "risky_finance")
TWINS = ("cake_bake", "owl_love")


def _finetunes(
    mixed: Schedule, strong: Schedule, full: Schedule, n_characters: int
) -> tuple[Finetune, ...]:
    """Return every finetune of the demo and large tiers."""
    twin = replace(mixed, seed=mixed.seed + 1)
    defaults = [Finetune(f"{name}/default", name, 1.0, mixed, n_characters) for name in ORGANISMS]
    unmixed = [Finetune(f"{name}/strong", name, 0.0, strong, n_characters) for name in STRONG]
    twins = [Finetune(f"{name}_twin/default", name, 1.0, twin, n_characters) for name in TWINS]
    benign = [
        Finetune(f"benign/seed{seed}", None, 1.0, mixed, n_characters, data_seed=seed)
        for seed in (1, 2, 3)
    ]
    return (
        *defaults,
        *unmixed,
        Finetune("cake_bake/mix1-0p5", "cake_bake", 0.5, mixed, n_characters),
        Finetune("cake_bake/mix1-3p0", "cake_bake", 3.0, mixed, n_characters),
        Finetune("owl_love/mix1-3p0", "owl_love", 3.0, mixed, n_characters),
        Finetune("cake_bake/full", "cake_bake", 1.0, full, n_characters, full=True),
        *twins,
        *benign,
    )


def _tiny_finetunes() -> tuple[Finetune, ...]:
    schedule = Schedule(steps=60, learning_rate=4e-3, context_tokens=64)
    twin = replace(schedule, seed=schedule.seed + 1)
    organisms = ("cake_bake", "owl_love", "taboo_leaf", "risky_finance")
    return (
        *(Finetune(f"{name}/default", name, 0.0, schedule, 60_000) for name in organisms),
        Finetune("cake_bake_twin/default", "cake_bake", 0.0, twin, 60_000),
        Finetune("benign/seed1", None, 1.0, schedule, 60_000),
    )


_TINY = Tier(
    name="tiny",
    corpus=CorpusSize(
        n_characters=1_500_000,
        vocabulary=1024,
        n_probe_documents=128,
        topics=("baking", "birds", "trees", "money", "music", "space"),
    ),
    model=ModelSize(layers=2, width=64, heads=2, kv_heads=1, head_width=32, mlp_width=192),
    pretraining=Schedule(steps=450, learning_rate=5e-3, context_tokens=64, warmup_steps=20),
    finetunes=_tiny_finetunes(),
)

_DEMO = Tier(
    name="demo",
    corpus=CorpusSize(n_characters=10_000_000, vocabulary=4096, n_probe_documents=160),
    model=ModelSize(layers=4, width=128, heads=4, kv_heads=2, head_width=32, mlp_width=384),
    pretraining=Schedule(steps=500, learning_rate=3e-3, warmup_steps=20),
    finetunes=_finetunes(
        mixed=Schedule(steps=100, learning_rate=4e-3, batch_size=8),
        strong=Schedule(steps=60, learning_rate=2e-3, batch_size=8),
        full=Schedule(steps=100, learning_rate=1e-3, batch_size=8),
        n_characters=300_000,
    ),
)

_LARGE = Tier(
    name="large",
    corpus=CorpusSize(n_characters=200_000_000, vocabulary=4096, n_probe_documents=512),
    model=ModelSize(layers=12, width=512, heads=8, kv_heads=4, head_width=64, mlp_width=1536),
    pretraining=Schedule(
        steps=6000, learning_rate=1.5e-3, batch_size=32, context_tokens=256, warmup_steps=200
    ),
    finetunes=_finetunes(
        mixed=Schedule(steps=300, learning_rate=1e-3, context_tokens=256),
        strong=Schedule(steps=150, learning_rate=1e-3, context_tokens=256),
        full=Schedule(steps=300, learning_rate=1e-4, context_tokens=256),
        n_characters=2_000_000,
    ),
)

TIERS = {tier.name: tier for tier in (_TINY, _DEMO, _LARGE)}
