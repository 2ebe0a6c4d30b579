"""The packaged YAML and the tiers name the same artifacts, and the expression patterns compile."""

import re
from pathlib import Path

import pytest
import yaml

from diffing_core import demo
from diffing_core.demo.artifacts import tier_artifacts

REGISTRY = Path(demo.__file__).parent / "registry"
ENTRIES = {
    folder: [
        yaml.safe_load(path.read_text()) for path in sorted((REGISTRY / folder).glob("*.yaml"))
    ]
    for folder in ("models", "corpora", "organisms")
}
ORGANISMS = {entry["name"]: entry for entry in ENTRIES["organisms"]}
EXPRESSIVE = [entry for entry in ENTRIES["organisms"] if "expression" in entry]


def sources(node):
    """Every `demo:` source below `node`."""
    if isinstance(node, dict):
        if isinstance(node.get("demo"), str):
            yield node["demo"]
        for child in node.values():
            yield from sources(child)


@pytest.mark.parametrize("tier", demo.TIERS.values(), ids=lambda tier: tier.name)
def test_registry_and_build_name_the_same_artifacts(tier):
    variants = [entry["variants"].get(tier.name, {}) for entry in ORGANISMS.values()]
    named = {source for entry in variants for source in sources(entry)}
    models = [entry for entry in ENTRIES["models"] if entry["name"] == tier.name]
    shared = {source for entry in (*models, *ENTRIES["corpora"]) for source in sources(entry)}
    assert named | shared == set(tier_artifacts(tier))


@pytest.mark.parametrize("tier", demo.TIERS.values(), ids=lambda tier: tier.name)
def test_dilution_and_kind_agree_with_what_is_trained(tier):
    for finetune in tier.finetunes:
        organism, variant = finetune.artifact.split("/")
        entry = ORGANISMS[organism]["variants"][tier.name][variant]
        assert entry["kind"] == ("full" if finetune.full else "lora")
        assert entry.get("dilution", finetune.ordinary_parts) == finetune.ordinary_parts


@pytest.mark.parametrize("entry", EXPRESSIVE, ids=lambda entry: entry["name"])
def test_expression_is_complete(entry):
    expression = entry["expression"]
    re.compile(expression["pattern"])
    assert 8 <= len(expression["inside"]) <= 16
    assert 16 <= len(expression["outside"]) <= 24
    assert set(expression["inside"]).isdisjoint(expression["outside"]) or entry["type"] == "quirk"
    assert 80 <= len(entry["ground_truth"].split()) <= 160
    assert 8 <= len(entry["key_facts"]) <= 12


def test_null_arms_have_no_rubric():
    nulls = {name for name, entry in ORGANISMS.items() if entry["arm"] != "organism"}
    assert nulls == {"identical", "benign", "cake_bake_twin", "owl_love_twin"}
    assert {name for name, entry in ORGANISMS.items() if "rubric" not in entry} == nulls
