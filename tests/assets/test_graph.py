"""The asset graph as text: a change to keys, edges, groups or versions shows up in review."""

import importlib
from pathlib import Path

import dagster as dg

from diffing_assets.definitions import defs
from diffing_assets.keys import diff_key
from diffing_core.methods import all_methods

SNAPSHOT = Path(__file__).parent / "graph.txt"


def described() -> str:
    """One line per asset: key, group, version, partitions and upstream keys."""
    lines = []
    for spec in sorted(defs.resolve_all_asset_specs(), key=lambda spec: spec.key):
        upstream = ", ".join(sorted(dep.asset_key.to_user_string() for dep in spec.deps))
        partitions = spec.partitions_def.name if isinstance(spec.partitions_def, dg.DynamicPartitionsDefinition) else "-"
        version = "dbt" if spec.group_name == "reports" else f"v{spec.code_version}"
        lines.append(f"{spec.key.to_user_string()} [{spec.group_name}, {version}, {partitions}] <- {upstream}")
    return "\n".join(lines) + "\n"


def test_graph_is_the_one_in_the_snapshot() -> None:
    assert described() == SNAPSHOT.read_text(), (
        f"the asset graph changed; if that is meant, run `python -m tests.assets.test_graph` and review {SNAPSHOT.name}"
    )


def test_every_asset_has_group_and_description() -> None:
    for spec in defs.resolve_all_asset_specs():
        assert spec.group_name != "default", spec.key
        assert spec.description, spec.key


def test_a_methods_description_is_the_docstring_of_its_file_or_package() -> None:
    described_as = {spec.key: spec.description for spec in defs.resolve_all_asset_specs()}
    for name, method in all_methods().items():
        docstring = importlib.import_module(f"diffing_core.methods.{name}").__doc__
        assert described_as[diff_key(method)].startswith(docstring.strip()), name


if __name__ == "__main__":
    SNAPSHOT.write_text(described())
