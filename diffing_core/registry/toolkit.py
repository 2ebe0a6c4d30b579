"""Converts organism and model files of the diffing-toolkit into a registry folder.

Each converter takes fields out of the file's mapping; what is left at the end is reported, so nothing
is dropped in silence. The result is loaded before this returns.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from diffing_core.errors import RegistryError
from diffing_core.registry.load import PACKAGED, Registry
from diffing_core.registry.yaml_files import read_mapping

_TYPES = {
    "SDF": "false_facts",
    "EM": "misalignment",
    "Taboo": "secret_word",
    "Secret": "secret_word",
    "Subliminal": "preference",
    "DomainAdaptation": "domain",
    "LanguageAdaptation": "domain",
    "sandbaggers": "sandbagging",
    "SandbaggingGames": "sandbagging",
    "ReasoningFinetune": "reasoning",
    "behavioral_anomaly": "quirk",
    "benign_quirk": "quirk",
    "character_training": "quirk",
}
TOOLKIT = ".toolkit"
_LIST_ITEM = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+(.+?)\s*$", re.MULTILINE)
_MIX = re.compile(r"mix1-(\d+)p(\d+)")
_SKIPS = ("ignore_first_n_tokens_per_sample_during_collection", "ignore_first_n_tokens_per_sample_during_training")
_RENAMED = {
    "description": "description",
    "end_of_turn_token": "end_of_turn",
    "attn_implementation": "attn_implementation",
    "token_level_replacement": "token_replacements",
    "chat_template": "chat_template",
    "trust_remote_code": "trust_remote_code",
}


@dataclass
class ImportReport:
    """What `import_toolkit` wrote, and a line for everything that is not as it was."""

    written: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join([f"{len(self.written)} file(s) written", *(f"* {note}" for note in self.notes)])


def import_toolkit(folder: Path, out_root: Path) -> ImportReport:
    """Converts `folder/model/*.yaml` and `folder/organism/*.yaml` into `out_root/models` and `out_root/organisms`.

    Raises:
        RegistryError: neither folder is there, or the result is not a valid registry.
    """
    files = {kind: sorted((folder / kind).glob("*.yaml")) for kind in ("model", "organism")}
    if not any(files.values()):
        raise RegistryError(f"no model/*.yaml or organism/*.yaml in {folder}; give the toolkit's configs folder")
    report = ImportReport()
    models = _convert_all(files["model"], _model, out_root / "models", report)
    _convert_all(files["organism"], lambda *given: _organism(*given, models), out_root / "organisms", report)
    Registry.load(out_root)
    return report


def _convert_all(
    files: list[Path],
    convert: Callable[[dict[str, Any], list[str]], dict[str, Any] | None],
    target: Path,
    report: ImportReport,
) -> dict[str, str]:
    """Writes the converted files; returns {toolkit's name: our name}. Names of packaged entries are kept apart."""
    taken = {file.stem for file in (PACKAGED / target.name).glob("*.yaml")}
    names: dict[str, str] = {}
    target.mkdir(parents=True, exist_ok=True)
    for file in files:
        notes: list[str] = []
        try:
            fields = read_mapping(file)
            original = str(fields.pop("name", file.stem))
            entry = convert(fields, notes)
        except RegistryError as error:
            entry, notes = None, [f"not converted: {error}"]
        report.notes += [f"{file.parent.name}/{file.name}: {note}" for note in notes]
        if entry is None:
            continue
        name = _mended(original, report.notes)
        if name in taken:
            report.notes.append(f"name {name!r} is an embedded entry's; it became {name + TOOLKIT!r}")
            name += TOOLKIT
        place = target / f"{name}.yaml"
        if place in report.written:
            report.notes.append(
                f"{file.parent.name}/{file.name}: not converted, the name {name} is taken by another file"
            )
            continue
        names[original] = name
        place.write_text(yaml.safe_dump({"name": name, **entry}, sort_keys=False, allow_unicode=True))
        report.written.append(place)
    return names


def _model(fields: dict[str, Any], notes: list[str]) -> dict[str, Any] | None:
    model_id, base_id = fields.pop("model_id", None), fields.pop("base_model_id", None)
    if not model_id:
        notes.append("not converted: no model_id (a placeholder)")
        return None
    entry: dict[str, Any] = {"source": source_of(base_id or model_id)}
    subfolder = fields.pop("subfolder", None)
    own = source_of(f"{model_id}/{subfolder}" if subfolder else model_id)
    if base_id:
        entry["adapter"] = own
    else:
        entry["source"] = own
    if tokenizer := fields.pop("tokenizer_id", None):
        entry["tokenizer"] = source_of(tokenizer)
    if dtype := fields.pop("dtype", None):
        entry["dtype"] = str(dtype).removeprefix("torch.")
    if skipped := max(fields.pop(name, None) or 0 for name in _SKIPS):
        entry["skip_first_tokens"] = skipped
    if fields.pop("has_enable_thinking", False):
        entry["thinking"] = False  # the toolkit asks with reasoning switched off, wherever there is a switch
    for theirs, ours in _RENAMED.items():
        if (value := fields.pop(theirs, None)) is not None:
            entry[ours] = value
    entry["vllm"] = _plain_part(fields.pop("vllm_kwargs", None) or {}, "vllm_kwargs.", notes)
    notes += _left_over(fields)
    return entry


def _organism(fields: dict[str, Any], notes: list[str], models: Mapping[str, str]) -> dict[str, Any] | None:
    variants = _variants(fields.pop("finetuned_models", None) or {}, models, notes)
    if not variants:
        notes.append("not converted: no finetuned model that is left (a placeholder)")
        return None
    theirs = str(fields.pop("type", None))
    ours = "reasoning" if theirs.startswith("R1") else _TYPES.get(theirs, "generic")
    notes.append(f"type {theirs} became {ours}, with the rubric of that name")
    entry: dict[str, Any] = {"type": ours, "description": str(fields.pop("description", "") or "")}
    entry |= _truth(str(fields.pop("description_long", None) or ""), ours, notes)
    if prompt := fields.pop("agent_interaction_system_prompt", None):
        entry["system_prompt"] = prompt
    if dataset := fields.pop("dataset", None):
        entry["training_corpus"] = _training_corpus(dict(dataset), notes)
    entry["metadata"] = _plain_part(fields.pop("metadata", None) or {}, "metadata.", notes)
    notes += _left_over(fields.pop("preprocessing_overrides", None) or {}, "preprocessing_overrides.")
    notes += _left_over(fields)
    return {**entry, "variants": variants}


def _truth(text: str, rubric: str, notes: list[str]) -> dict[str, Any]:
    if not text.strip():
        notes.append("no description_long: arm unknown, it will not be graded")
        return {"arm": "unknown"}
    facts = _LIST_ITEM.findall(text)
    if not facts:
        notes.append("description_long has no list: it became the one key fact")
    return {"arm": "organism", "ground_truth": text, "key_facts": facts or [text.strip()], "rubric": rubric}


def _variants(given: Mapping[str, Any], models: Mapping[str, str], notes: list[str]) -> dict[str, Any]:
    variants: dict[str, Any] = {}
    for model, of_model in given.items():
        if model not in models:
            notes.append(f"finetuned_models.{model}: not converted, there is no file for that model")
            continue
        for name, variant in _variants_of(model, of_model or {}, notes):
            of_ours = variants.setdefault(models[model], {})
            if name in of_ours:
                notes.append(f"finetuned_models.{model}: a second variant {name} not converted")
            else:
                of_ours[name] = variant
    return variants


def _variants_of(model: str, given: Mapping[str, Any], notes: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, given_ids in given.items():
        ids = dict(given_ids or {})
        where = f"finetuned_models.{model}.{name}"
        adapter, whole = ids.pop("adapter_id", None), ids.pop("model_id", None)
        notes += _left_over(ids, f"{where}.")
        identifier = adapter or whole
        if not identifier or "${" in identifier:
            notes.append(f"{where}: not converted, found {identifier or 'neither adapter_id nor model_id'}")
            continue
        variant: dict[str, Any] = {"kind": "lora" if adapter else "full", "source": source_of(identifier)}
        if mix := _MIX.search(str(name)):
            variant["dilution"] = float(".".join(mix.groups()))
        yield _mended(str(name), notes), variant


def _training_corpus(dataset: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    chat = bool(dataset.pop("is_chat", False))
    columns = {True: dataset.pop("messages_column", None), False: dataset.pop("text_column", None)}
    corpus = {
        "source": {"repo": dataset.pop("id")},
        "kind": "chat" if chat else "text",
        "column": columns[chat],
        "subset": dataset.pop("subset", None),
        "splits": dataset.pop("splits", None) or ["train"],
    }
    notes += _left_over(dataset, "dataset.")
    return {name: value for name, value in corpus.items() if value is not None}


def source_of(identifier: str) -> dict[str, str]:
    """`owner/repo/sub/dir` is a folder inside a repository; anything that begins as a path is one."""
    if identifier.startswith(("/", ".", "~")):
        return {"path": str(Path(identifier).expanduser())}
    owner_and_name, subfolder = identifier.split("/")[:2], identifier.split("/")[2:]
    source = {"repo": "/".join(owner_and_name)}
    return source | ({"subfolder": "/".join(subfolder)} if subfolder else {})


def _plain_part(given: Mapping[str, Any], prefix: str, notes: list[str]) -> dict[str, Any]:
    """Scalars and lists of scalars; what is nested deeper is reported."""
    plain = {
        name: value
        for name, value in given.items()
        if all(isinstance(one, str | int | float | bool) for one in (value if isinstance(value, list) else [value]))
    }
    notes += _left_over({name: value for name, value in given.items() if name not in plain}, prefix)
    return plain


def _left_over(fields: Mapping[str, Any], prefix: str = "") -> list[str]:
    return [f"{prefix}{name}: {value!r} not carried over" for name, value in fields.items() if value is not None]


def _mended(name: str, notes: list[str]) -> str:
    mended = re.sub(r"\.\.+", ".", re.sub(r"[^A-Za-z0-9.\-]+", "_", name)).strip("_.-") or "unnamed"
    if mended != name:
        notes.append(f"name {name!r} became {mended!r}")
    return mended
