"""What an edited model is to be: one YAML specification for amplification, negation, sums, truncation and ablation.

    name: louder
    adapters:                                   # several: their changes are added up
      - organism: cake_bake                     # or source: {repo: owner/name}, or path: a folder with an adapter or a
                                                # whole checkpoint; without any of them the finetune of the pair at hand
        layer_amplifications:
          - layers: {start: 0.0, end: 0.8}      # a block, a list of blocks, a range with both ends, or all
            is_relative: true                   # then numbers are fractions of depth, and the nearest block is meant
            module_amplifications: [{modules: attention, weight: 2.0}]
        rank: 1                                 # only the leading direction of each matrix; residual: all but it
        turn_seed: 0                            # a control: as large, with directions at random

A weight multiplies the change ΔW = W_tuned − W_base: 1 is the finetune, 0 the base, −1 its opposite, 0.5 the middle.
Blocks that nothing names, and modules that a naming leaves out, keep 1. The last naming of a block holds. An adapter
that is given twice counts once, with all its amplifications; one with nothing to do is left out.

Embeddings, head and final norm lie in no block: they follow only where all layers and all modules are named.

Files of the diffing-toolkit are read as they are: `organism_name` is the organism, and where that is `custom`, `variant`
is a repository, a folder, or null for the finetune of the pair at hand.
"""

from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import AfterValidator, AliasChoices, BaseModel, ConfigDict, Field, ValidationError, model_validator

from diffing_core.blocks import pick_layers
from diffing_core.errors import RegistryError, UndeclaredNeedError
from diffing_core.pairs import check_name
from diffing_core.registry import Source
from diffing_core.registry.problems import close_to, describe
from diffing_core.registry.toolkit import source_of
from diffing_core.registry.yaml_files import read_mapping
from diffing_core.tensor_names import Part

Combination = Literal[
    "sum", "linear", "svd", "ties", "ties_svd", "dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
]  # fmt: skip


def _name(value: str) -> str:
    try:
        return check_name(value)
    except RegistryError as error:
        raise ValueError(str(error)) from error


Name = Annotated[str, AfterValidator(_name)]
CUSTOM = "custom"  # the toolkit's word for a finetune that it has no name for


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LayerRange(_Entry):
    """Blocks from `start` to `end`, both included."""

    type: Literal["range"] = "range"
    start: int | float
    end: int | float


class ModuleAmplification(_Entry):
    """What the change of some modules is multiplied with."""

    modules: Literal["all", "attention", "mlp"] = "all"
    weight: float = Field(allow_inf_nan=False)


class LayerAmplification(_Entry):
    """Weights for some blocks."""

    layers: int | float | tuple[int | float, ...] | LayerRange | Literal["all"]
    is_relative: bool = False
    module_amplifications: tuple[ModuleAmplification, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _numbers_fit(self) -> "LayerAmplification":
        for number in self._numbers():
            if self.is_relative and not 0 <= number <= 1:
                raise ValueError(f"layers: {number} is no fraction of depth (0.0 to 1.0); or drop is_relative")
            if not self.is_relative and (isinstance(number, float) or number < 0):
                raise ValueError(f"layers: {number} is no block number (0, 1, …); for a fraction add is_relative: true")
        if isinstance(self.layers, LayerRange) and self.layers.start > self.layers.end:
            raise ValueError(f"layers: the range ends at {self.layers.end}, before its start {self.layers.start}")
        if self.layers == ():
            raise ValueError("layers: an empty list; write all, or drop this entry")
        return self

    def blocks(self, n_layers: int) -> tuple[int, ...]:
        """Block numbers in a model of `n_layers`; raises RegistryError for one that it does not have.

        A fraction r is the block nearest to r · (n − 1), as in the diffing-toolkit, whose files are read here.
        """
        if self.layers == "all":
            return tuple(range(n_layers))
        numbers = [round(each * (n_layers - 1)) if self.is_relative else int(each) for each in self._numbers()]
        try:
            picked = [pick_layers([number], n_layers)[0] for number in numbers]
        except UndeclaredNeedError as error:
            raise RegistryError(f"layers: {error}") from error
        return tuple(range(picked[0], picked[1] + 1)) if isinstance(self.layers, LayerRange) else tuple(picked)

    def _numbers(self) -> tuple[int | float, ...]:
        match self.layers:
            case "all":
                return ()
            case LayerRange():
                return self.layers.start, self.layers.end
            case tuple():
                return self.layers
        return (self.layers,)


class Amplification(_Entry):
    """A named way to weigh the change of one finetune."""

    name: Name
    description: str = ""
    layer_amplifications: tuple[LayerAmplification, ...] = Field(min_length=1)

    def edit(self) -> "WeightEdit":
        """The same as a whole specification of the pair's own finetune."""
        adapter = AdapterEdit(layer_amplifications=self.layer_amplifications)
        return WeightEdit(name=self.name, description=self.description, adapters=(adapter,))


class AdapterEdit(_Entry):
    """One finetune, adapter or whole checkpoint, and what is done to its change; named by nothing, the pair's own."""

    organism: Name | None = Field(None, validation_alias=AliasChoices("organism", "organism_name"))
    variant: Name = "default"
    source: Source | None = None
    path: Path | None = None
    layer_amplifications: tuple[LayerAmplification, ...] = ()
    rank: int | None = Field(None, ge=1)
    residual: bool = False
    """With `rank`: everything but the leading directions."""
    keep_norm: bool = False
    """With `rank`: scaled, matrix by matrix, to the Frobenius norm of the whole change."""
    turn_seed: int | None = Field(None, ge=0)
    """Turns the directions of every matrix at random and keeps its singular values: a control that was taught nothing."""

    @model_validator(mode="before")
    @classmethod
    def _custom(cls, entry: Any) -> Any:
        if not isinstance(entry, dict) or entry.get("organism_name") != CUSTOM:
            return entry
        variant = entry.get("variant")
        place = source_of(variant) if isinstance(variant, str) and variant else {}
        named = place if "path" in place else {"source": place} if place else {}
        return {key: value for key, value in entry.items() if key not in ("organism_name", "variant")} | named

    @model_validator(mode="after")
    def _sensible(self) -> "AdapterEdit":
        if sum(each is not None for each in (self.organism, self.source, self.path)) > 1:
            raise ValueError("an adapter is named by one of organism (with variant), source and path, not by several")
        if self.rank is None and (self.residual or self.keep_norm):
            raise ValueError("residual and keep_norm say what is done with a rank; add rank: 1 or drop them")
        return self

    @property
    def place(self) -> str:
        """Which finetune is meant; empty: the pair's own."""
        if self.organism is not None:
            return f"{self.organism}/{self.variant}"
        if self.source is not None:
            return f"source {self.source}"
        return f"path {self.path}" if self.path else ""

    @property
    def does_something(self) -> bool:
        """Whether anything but the finetune as it is was asked for."""
        return bool(self.layer_amplifications) or self.rank is not None or self.turn_seed is not None


class WeightEdit(_Entry):
    """A whole specification."""

    name: Name
    description: str = ""
    adapters: tuple[AdapterEdit, ...] = Field(min_length=1)
    combine: Combination = "sum"
    """How several changes are put together: `sum` is exact, the others are PEFT's `add_weighted_adapter`."""
    density: float | None = Field(None, gt=0, le=1)
    """Share of entries that TIES, DARE and pruning keep."""
    seed: int = 0
    """Of DARE's random choice."""

    @model_validator(mode="after")
    def _density_where_used(self) -> "WeightEdit":
        prunes = self.combine.startswith(("ties", "dare", "magnitude"))
        if prunes != (self.density is not None):
            raise ValueError(f"combine: {self.combine} {'needs a density, for example 0.2' if prunes else 'has no density'}")
        return self

    def on(self, organism: str, variant: str = "default") -> "WeightEdit":
        """The same, where the pair's own finetune is this one."""
        named = {"organism": organism, "variant": variant}
        adapters = tuple(each if each.place else each.model_copy(update=named) for each in self.adapters)
        return self.model_copy(update={"adapters": adapters})

    def effective(self) -> tuple[AdapterEdit, ...]:
        """Each finetune once, with all that was asked of it; those of which nothing was asked are left out.

        Raises:
            RegistryError: two entries of one finetune ask for different ranks, or nothing is left.
        """
        found: dict[str, AdapterEdit] = {}
        for each in (each for each in self.adapters if each.does_something):
            before = found.get(each.place)
            if before is not None:
                cuts = [(edit.rank, edit.residual, edit.keep_norm, edit.turn_seed) for edit in (before, each)]
                if cuts[0] != cuts[1]:
                    raise RegistryError(f"{self.name}: adapter {each.place or 'of the pair'} is given with two ranks or turns")
                joined = before.layer_amplifications + each.layer_amplifications
                each = each.model_copy(update={"layer_amplifications": joined})
            found[each.place] = each
        if not found:
            raise RegistryError(
                f"{self.name}: no adapter has layer_amplifications or a rank, so there is nothing to write; to add "
                "finetunes as they are, give each layer_amplifications of weight 1.0"
            )
        return tuple(found.values())


class LayerWeights(NamedTuple):
    """Weights inside one block; `other` are its norms and what is neither attention nor MLP."""

    attention: float = 1.0
    mlp: float = 1.0
    other: float = 1.0


class ChangeWeights(NamedTuple):
    """Weights of one finetune's change, per block and outside of blocks (embeddings, head, final norm)."""

    layers: tuple[LayerWeights, ...]
    outside: float = 1.0

    @property
    def mean(self) -> float:
        """Mean over the attention and MLP weights of all blocks: 1 is the finetune, 0 the base."""
        return sum(each.attention + each.mlp for each in self.layers) / (2 * len(self.layers))

    def of(self, layer: int | None, part: Part) -> float:
        """The weight of a tensor at this place."""
        if layer is None or layer >= len(self.layers):
            return self.outside
        return self.layers[layer]._asdict()[{"attn": "attention"}.get(part, part if part == "mlp" else "other")]


def resolve(amplifications: tuple[LayerAmplification, ...], n_layers: int) -> ChangeWeights:
    """Weights for a model of `n_layers` blocks.

    Raises:
        RegistryError: a block that the model does not have.
    """
    layers = [LayerWeights()] * n_layers
    outside = 1.0
    for each in amplifications:
        named: dict[str, float] = {}
        for module in each.module_amplifications:
            keys = LayerWeights._fields if module.modules == "all" else (module.modules,)
            named |= dict.fromkeys(keys, module.weight)
        for block in each.blocks(n_layers):
            layers[block] = LayerWeights(**named)
        if each.layers == "all":
            outside = named.get("other", 1.0)
    return ChangeWeights(tuple(layers), outside)


def uniform(weight: float) -> tuple[LayerAmplification, ...]:
    """The same weight everywhere: interpolation and negation."""
    module = ModuleAmplification(weight=weight)
    return (LayerAmplification(layers="all", module_amplifications=(module,)),)


@cache
def presets() -> dict[str, Amplification]:
    """The packaged amplifications by name."""
    entries = yaml.safe_load((files(__package__) / "presets.yaml").read_text("utf-8"))
    return {entry["name"]: Amplification.model_validate(entry) for entry in entries}


def preset(name: str) -> Amplification:
    """The packaged amplification of that name, or RegistryError."""
    if name not in presets():
        raise RegistryError(f"no amplification {name!r}{close_to(name, presets())}")
    return presets()[name]


def amplified(name: str, organism: str, variant: str = "default") -> WeightEdit:
    """A packaged amplification of one organism; raises RegistryError for a name that there is not."""
    return preset(name).edit().on(organism, variant).model_copy(update={"name": f"{organism}-{name}"})


def read_specification(file: Path) -> WeightEdit:
    """The specification in a YAML file; relative paths count from the file's folder.

    Raises:
        RegistryError: every problem of the file, a line each.
    """
    if not file.is_file():
        raise RegistryError(f"no file {file}; a packaged amplification ({', '.join(presets())}) needs an organism")
    try:
        edit = WeightEdit.model_validate(read_mapping(file))
    except RegistryError as error:
        raise RegistryError(f"{file}: {error}") from error
    except ValidationError as error:
        lines = "\n".join(f"{file}: {line}" for line in describe(error, WeightEdit))
        raise RegistryError(f"the specification is not acceptable:\n{lines}") from error
    adapters: list[Any] = [
        each if each.path is None else each.model_copy(update={"path": file.parent / each.path})
        for each in edit.adapters
    ]
    return edit.model_copy(update={"adapters": tuple(adapters)})
