"""`diffing edit` writes from the registry and tells mistakes in one line."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from diffing_assets.cli import app
from diffing_core.errors import RegistryError
from tests import model_files


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    base = model_files.save_base(tmp_path / "base")
    adapter = model_files.save_adapter(tmp_path / "adapter", base)
    for kind in ("models", "organisms"):
        (tmp_path / "registry" / kind).mkdir(parents=True)
    (tmp_path / "registry" / "models" / "tiny_base.yaml").write_text(f"name: tiny_base\nsource: {{path: {base}}}\n")
    (tmp_path / "registry" / "organisms" / "mine.yaml").write_text(
        "name: mine\ntype: generic\narm: unknown\ndescription: d\n"
        f"variants: {{tiny_base: {{default: {{kind: lora, source: {{path: {adapter}}}}}}}}}\n"
    )
    monkeypatch.setenv("DIFFING_HOME", str(tmp_path))
    return tmp_path


def test_a_packaged_amplification_and_a_file(registry: Path) -> None:
    out = registry / "out"
    asked = ["--model", "tiny_base", "--out", str(out)]
    done = CliRunner().invoke(app, ["edit", "2x", "--organism", "mine", *asked])
    assert done.exit_code == 0, done.output
    assert (Path(done.stdout.strip()) / "adapter_config.json").exists()
    file = registry / "cut.yaml"
    file.write_text("name: cut\nadapters: [{organism: mine, rank: 1}]\n")
    done = CliRunner().invoke(app, ["edit", str(file), *asked])
    assert Path(done.stdout.strip()).name.startswith("cut-")


def test_a_file_that_leaves_the_finetune_open_is_for_the_organism_that_is_named(registry: Path) -> None:
    """The toolkit's presets are written so: organism_name custom, variant null."""
    module = "{modules: all, weight: 2.0}"
    file = registry / "default_2x.yaml"
    file.write_text(
        "name: default_2x\nadapters:\n- organism_name: custom\n  variant: null\n"
        f"  layer_amplifications: [{{layers: all, module_amplifications: [{module}]}}]\n"
    )
    asked = ["edit", str(file), "--model", "tiny_base", "--out", str(registry / "out")]
    done = CliRunner().invoke(app, [*asked, "--organism", "mine"])
    assert Path(done.stdout.strip()).name.startswith("default_2x-"), done.output
    refused = CliRunner().invoke(app, asked)
    assert isinstance(refused.exception, RegistryError)
    assert "names no finetune" in str(refused.exception)


def test_a_name_without_an_organism_is_told(registry: Path) -> None:
    done = CliRunner().invoke(app, ["edit", "2x", "--model", "tiny_base", "--out", str(registry)])
    assert isinstance(done.exception, RegistryError)
    assert "needs an organism" in str(done.exception)


def test_what_the_written_model_lacks_is_told_beside_its_folder(registry: Path) -> None:
    model_files.save_base(registry / "larger", seed=2, vocab_size=model_files.VOCAB + 2)
    file = registry / "more.yaml"
    file.write_text(f"name: more\nadapters: [{{path: {registry / 'larger'}, rank: 1}}]\n")
    done = CliRunner().invoke(app, ["edit", str(file), "--model", "tiny_base", "--out", str(registry / "out")])
    assert Path(done.stdout.strip()).is_dir(), done.output
    assert "no place for it: embed_tokens.weight: rows 64 to 65" in done.stderr
