"""Models from a hub repository, over the hub's own protocol; and which calls need torch at all."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from diffing_core.errors import ModelLoadError
from diffing_core.models import load_cohort, load_pair, source_revisions
from diffing_core.pairs import Pair
from diffing_core.registry import Model, Organism, Registry, Source, Variant
from tests.hub import commit_of, reached, serve
from tests.model_files import save_adapter, save_base

BASE = Source(repo="lab/base", subfolder="weights/final")


@pytest.fixture(scope="module")
def hub_root(tmp_path_factory) -> Path:
    """`lab/base` with weights in a subfolder (and a pickled twin), `lab/adapters` with two steps at revision v2."""
    root = tmp_path_factory.mktemp("hub")
    base = save_base(root / "lab/base/main/weights/final")
    (base / "pytorch_model.bin").write_bytes(b"not to be fetched")
    for step, seed in (("step-10", 1), ("step-20", 2)):
        config = save_adapter(root / f"lab/adapters/v2/{step}", base, seed=seed) / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "lab/base"}))
    (root / "lab/pickled/main").mkdir(parents=True)
    (root / "lab/pickled/main/adapter_config.json").write_text('{"peft_type": "LORA"}')
    (root / "lab/pickled/main/adapter_model.bin").write_bytes(b"not to be fetched")
    return root


@pytest.fixture
def cache(hub_root, tmp_path, monkeypatch) -> Iterator[Path]:
    """An empty cache, filled from the loopback hub."""
    with reached(hub_root, tmp_path, monkeypatch) as empty:
        yield empty


def registry_of(base: Source = BASE, **adapters: Source) -> Registry:
    variants = {"tiny": {name: Variant(kind="lora", source=source) for name, source in adapters.items()}}
    organism = Organism(name="o", type="generic", arm="unknown", description="", variants=variants)
    return Registry({"tiny": Model(name="tiny", source=base)}, {}, {"o": organism})


def at_step(step: int) -> Source:
    return Source(repo="lab/adapters", revision="v2", subfolder=f"step-{step}")


def test_base_and_adapter_with_revision_and_subfolder(cache):
    registry = registry_of(default=at_step(10), later=at_step(20))
    known = source_revisions(Pair("tiny", "o"), registry)
    assert not list(cache.rglob("*.safetensors"))
    pair = load_pair(Pair("tiny", "o"), registry=registry)
    assert known == (pair.base_revision, pair.adapter_hash)
    assert known == (f"{commit_of('main')}.weights.final", f"{commit_of('v2')}.step-10")
    assert pair.notes == ()
    assert source_revisions(Pair("tiny", "o", "later"), registry)[1] == f"{commit_of('v2')}.step-20"
    assert not list(cache.rglob("*.bin"))
    assert not list(cache.rglob("step-20/*"))


def test_what_is_not_on_the_hub_is_named(cache):
    registry = registry_of(
        repo=Source(repo="lab/nothing"),
        revision=Source(repo="lab/adapters", revision="v9"),
        subfolder=at_step(30),
        weights=Source(repo="lab/pickled"),
    )
    told = {pair.variant: str(error) for pair, error in load_cohort(registry.pairs(), registry).failed.items()}
    assert "cannot fetch lab/nothing (revision default) from the hub: RepositoryNotFoundError" in told["repo"]
    assert "cannot fetch lab/adapters (revision v9) from the hub: RevisionNotFoundError" in told["revision"]
    assert "repository lab/adapters (revision v2) has no model files in step-30" in told["subfolder"]
    assert "holds no .safetensors file (found no weights)" in told["weights"]


def test_without_a_hub_a_pinned_commit_is_still_known(monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    commit = commit_of("v2")
    pinned = Source(repo="lab/adapters", revision=commit)
    assert source_revisions(Pair("tiny", "o"), registry_of(base=pinned, default=pinned)) == (commit, commit)
    with pytest.raises(ModelLoadError, match=r"cannot fetch lab/base .* ConnectError .* HF_TOKEN and the network"):
        source_revisions(Pair("tiny", "o"), registry_of(default=pinned))


CODE = """
import json, sys
from pathlib import Path
from diffing_core.models import source_revisions
from diffing_core.registry import Registry
light = not {"torch", "transformers", "peft", "huggingface_hub"} & set(sys.modules)
registry = Registry.load(Path(sys.argv[1]))
revisions = [source_revisions(pair, registry) for pair in registry.pairs()]
print(json.dumps([light, "torch" in sys.modules, revisions]))
"""


def test_the_declarations_and_revisions_import_no_torch(hub_root, tmp_path):
    save_base(tmp_path / "base")
    for kind in ("models", "organisms"):
        (tmp_path / kind).mkdir()
    (tmp_path / "models/tiny.yaml").write_text("{name: tiny, source: {path: base}}")
    (tmp_path / "organisms/o.yaml").write_text(
        "{name: o, type: generic, arm: unknown, description: d, variants: {tiny: {default: {kind: lora, "
        "source: {repo: lab/adapters, revision: v2, subfolder: step-10}}}}}"
    )
    with serve(hub_root) as endpoint:
        done = subprocess.run(
            [sys.executable, "-c", CODE, tmp_path],
            env=os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    light, has_torch, [[base, adapter]] = json.loads(done.stdout)
    assert light
    assert not has_torch
    assert len(base) == 16
    assert adapter == f"{commit_of('v2')}.step-10"
