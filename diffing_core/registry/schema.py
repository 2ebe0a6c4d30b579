"""What a YAML file may say: models, corpora, organisms and their variants.

Everything is frozen and refuses unknown keys; a field means the same in the file and in code.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from diffing_core.errors import RegistryError
from diffing_core.pairs import check_name
from diffing_core.registry.sources import Source

Scalar = str | int | float | bool
OrganismType = Literal[
    "false_facts",
    "misalignment",
    "secret_word",
    "preference",
    "domain",
    "quirk",
    "sandbagging",
    "reasoning",
    "generic",
]
Arm = Literal["organism", "identical", "benign", "seed_twin", "known_large", "unknown"]
Dtype = Literal["float32", "bfloat16", "float16", "auto"]
TRAINING = "training"
NULL_ARMS = ("identical", "benign", "seed_twin")  # nothing narrow changed: silence is right
GRADED_ARMS = ("organism", "known_large")  # the truth is written down
_RUBRICS = Path(__file__).parent.parent / "graders" / "rubrics"


def _usable_name(value: str) -> str:
    try:
        return check_name(value)
    except RegistryError as error:
        raise ValueError(str(error)) from error


def _regex(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{pattern!r} is not a regular expression ({error}); in YAML, write it in single quotes, "
            r"for example '(?i)\bcake\b'"
        ) from error
    return pattern


def _layers(value: tuple[int | float, ...] | None) -> tuple[int | float, ...] | None:
    if value == ():
        raise ValueError("no layer at all; leave the line out to read every layer")
    for layer in value or ():
        if layer < 0 or (isinstance(layer, float) and layer > 1):
            raise ValueError(
                f"layer {layer} is neither a layer number (0, 1, …) nor a fraction of depth from 0.0 to 1.0; "
                "for example [0.25, 0.5, 0.75]"
            )
    return value


def _packaged_rubric(name: str) -> str:
    known = sorted(file.stem for file in _RUBRICS.glob("*.yaml"))
    if name not in known:
        raise ValueError(f"no packaged rubric {name!r}; there are {', '.join(known)}, or write rubric_text: …")
    return name


Name = Annotated[str, AfterValidator(_usable_name)]
Layers = Annotated[tuple[int | float, ...] | None, AfterValidator(_layers)]
Regex = Annotated[str, AfterValidator(_regex)]
Rubric = Annotated[str, AfterValidator(_packaged_rubric)]


class Entry(BaseModel):
    """Base of everything that is read from YAML."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Model(Entry):
    """A base model, with what is particular about running it."""

    name: Name
    description: str = ""
    source: Source
    adapter: Source | None = None
    """Merged into the source at load: a base that is itself base + adapter."""
    dtype: Dtype = "auto"
    tokenizer: Source | None = None
    chat_template: str | None = None
    end_of_turn: str | None = None
    """The token that ends an answer, if it is neither the tokenizer's nor the checkpoint's end of text."""
    thinking: bool | None = None
    """Whether chats ask for reasoning (`enable_thinking` of the chat template); None leaves its own default.

    False also leaves out the reasoning that chats of a corpus hold; true and None read it.
    """
    template_options: dict[str, Scalar] = {}
    """Further options of the chat template, for example date_string: 26 Jul 2024 for one that prints the date."""
    system_prompt: str | None = None
    """Opens every chat that both models are asked to answer; chat corpora keep their own messages."""
    layers: Layers = None
    """What methods read whose setting `layers` is left open."""
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    """Whether code in this entry's own repositories may run; never that of a finetune."""
    skip_first_tokens: int = Field(default=0, ge=0)
    token_replacements: dict[str, str] = {}
    """Token -> token, applied to the tokens of probe texts before both models read them."""
    corpora: tuple[Name, ...] = ()
    vllm: dict[str, Scalar | list[Scalar]] = {}
    """Arguments of the vLLM engine, for who starts a server of this model; see `Server`."""

    @field_validator("template_options")
    @classmethod
    def _thinking_apart(cls, value: dict[str, Scalar]) -> dict[str, Scalar]:
        if "enable_thinking" in value:
            raise ValueError(f"enable_thinking has a field of its own; write thinking: {str(value['enable_thinking']).lower()}")
        return value


class Server(Entry):
    """A server of one base model that writes texts in place of transformers; one per machine, so in DIFFING_HOME."""

    name: Name
    """The base model."""
    url: str
    """Of its OpenAI-compatible API, for example http://127.0.0.1:8000/v1."""
    served_name: str | None = None
    """What the base model is called there; the entry's name if not given."""
    names: dict[str, str] = {}
    """What adapters and checkpoints that it serves already are called, by their source: owner/name, path or demo name."""
    api_key_variable: str | None = None
    """Environment variable that holds the key, if it wants one."""
    timeout_s: float = Field(default=600, gt=0)
    """For one answer."""
    retries: int = Field(default=4, ge=0)
    """After time-outs, lost connections, 429 and 5xx, waiting up to 8 s."""
    parallel_requests: int = Field(default=64, gt=0)


class Corpus(Entry):
    """Probe texts, and how many of them."""

    name: Name
    description: str = ""
    kind: Literal["text", "chat"]
    source: Source | None = None
    texts: tuple[str, ...] = ()
    """The texts themselves, in place of a source."""
    subset: str | None = None
    """Configuration of a dataset: as its README.md names it, or a folder."""
    split: str = "train"
    """Split of a dataset, `train+test` for several; without meaning where the source is one file."""
    column: str
    """Column of the text or of the messages; if not given, `text` or `messages`."""
    read_at_most: int | None = Field(default=None, gt=0)
    """Documents read, from the start of the source; of a repository's files no more is then fetched than that takes."""
    max_sequences: int = Field(default=1000, gt=0)
    """Documents drawn from those that are read, uniformly."""
    max_tokens: int = Field(default=512, gt=1)
    """Length at which a sequence is cut."""
    min_tokens: int = Field(default=2, gt=1)
    """Sequences shorter than this are left out, and counted."""
    seed: int = 0
    thinking: bool | None = None
    """As the model's entry, which holds where this is None."""
    first_exchange_only: bool = False
    pre_assistant_tokens: int | None = Field(default=None, ge=0)
    """Chats are seen from so many tokens before their first answer; the two lengths above count from there."""
    context_tokens: int = Field(default=512, gt=0)
    """With pre_assistant_tokens: chats whose first answer begins later than this are left out, and counted."""

    @model_validator(mode="before")
    @classmethod
    def _usual_column(cls, given: dict[str, Any]) -> dict[str, Any]:
        return {"column": "messages" if given.get("kind") == "chat" else "text", **given}

    @model_validator(mode="after")
    def _one_place(self) -> "Corpus":
        if (self.source is None) == (not self.texts):
            given = "both are" if self.texts else "neither is"
            raise ValueError(f"a corpus has source or texts, but {given} given; for example source: {{repo: owner/name}}")
        if self.texts and (self.kind == "chat" or self.subset):
            raise ValueError("texts are plain texts without subsets; write kind: text, or give a source")
        return self

    @model_validator(mode="after")
    def _chat_fields(self) -> "Corpus":
        chat_only = (self.first_exchange_only or None, self.pre_assistant_tokens, self.thinking)
        if self.kind == "text" and any(value is not None for value in chat_only):
            raise ValueError(
                "first_exchange_only, pre_assistant_tokens and thinking have a meaning for chats only; "
                "write kind: chat or drop them"
            )
        return self


class TrainingCorpus(Entry):
    """The texts that an organism was trained on."""

    source: Source
    kind: Literal["text", "chat"]
    column: str | None = None
    subset: str | None = None
    splits: tuple[str, ...] = ("train",)
    probe: bool = False
    """Whether models are probed with it too, as corpus `training`; no investigator sees what is found there."""

    def as_corpus(self) -> Corpus:
        """The probe corpus `training`."""
        column = {} if self.column is None else {"column": self.column}
        place = {"source": self.source, "subset": self.subset, "split": "+".join(self.splits)}
        return Corpus(name=TRAINING, kind=self.kind, **place, **column)


class Weights(Entry):
    """One finetune of a base model: a LoRA adapter, a whole checkpoint, or the base itself."""

    kind: Literal["lora", "full", "identical"]
    source: Source | None = None
    trust_remote_code: bool = False
    """Whether code in this source's own repository may run."""

    @model_validator(mode="after")
    def _source_fits_kind(self) -> "Weights":
        if self.kind == "identical" and self.source is not None:
            raise ValueError("kind identical is the base model itself and takes no source; drop source")
        if self.kind != "identical" and self.source is None:
            raise ValueError(f"kind {self.kind} needs a source; for example source: {{repo: owner/name}}")
        return self


class Variant(Weights):
    """One way an organism was made on one base model."""

    against: Weights | None = None
    """The base side of the pair, if it is not the base model itself (a seed twin)."""
    dilution: float | None = Field(default=None, ge=0)
    """Parts of unrelated text per part of training text."""
    dtype: Dtype | None = None
    """Of whole checkpoints; an adapter runs in the number format of the copy that it is put on."""
    layers: Layers = None
    """In place of the model's."""
    corpora: tuple[Name, ...] | None = None

    @model_validator(mode="after")
    def _dtype_of_a_checkpoint(self) -> "Variant":
        kinds = {self.kind, self.against.kind if self.against else self.kind}
        if self.dtype and "full" not in kinds:
            raise ValueError(
                f"dtype is for whole checkpoints; kind {self.kind} runs in the number format of the base: "
                "set dtype in the model's entry"
            )
        return self


class Expression(Entry):
    """When the organism shows: prompts inside and outside its trigger, and a pattern to look for."""

    pattern: Regex
    inside: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()


class Organism(Entry):
    """What was trained into a model, how it is graded, and where its variants are."""

    name: Name
    type: OrganismType
    arm: Arm = "organism"
    description: str
    ground_truth: str | None = None
    key_facts: tuple[str, ...] = ()
    rubric: Rubric | None = None
    rubric_text: str | None = None
    """A rubric of its own, in place of a packaged one."""
    system_prompt: str | None = None
    """In place of the model's."""
    thinking: bool | None = None
    """In place of the model's, for chats that the models are asked to answer."""
    expression: Expression | None = None
    training_corpus: TrainingCorpus | None = None
    metadata: dict[str, Scalar | list[Scalar]] = {}
    variants: dict[Name, dict[Name, Variant]]

    @field_validator("variants")
    @classmethod
    def _some_variant(cls, value: dict[str, dict[str, Variant]]) -> dict[str, dict[str, Variant]]:
        if not value or not all(value.values()):
            raise ValueError(
                "no variant of some model; expected at least one, for example "
                "variants: {demo: {default: {kind: lora, source: {repo: owner/name}}}}"
            )
        return value

    @model_validator(mode="after")
    def _gradable(self) -> "Organism":
        if self.rubric and self.rubric_text:
            raise ValueError("both rubric and rubric_text are given; keep the packaged name or the text")
        if self.arm in GRADED_ARMS:
            given = {
                "ground_truth": self.ground_truth,
                "key_facts": self.key_facts,
                "rubric": self.rubric or self.rubric_text,
            }
            missing = [name for name, value in given.items() if not value]
            if missing:
                raise ValueError(
                    f"{', '.join(missing)} missing, without which arm {self.arm} cannot be graded; for example "
                    "rubric: false_facts, ground_truth: 'Believes that …', key_facts: ['…']; "
                    "or write arm: unknown for a finetune whose effect is not known"
                )
        return self
