"""The registry: YAML in, validated entries out, every mistake told with file, field and a way to mend it."""

from pathlib import Path

import pytest

from diffing_core.errors import RegistryError
from diffing_core.pairs import Pair
from diffing_core.registry import HubRef, Registry, Source, add_organism, load_registry

MODEL = """
name: mini
source: {repo: lab/mini, revision: main}
dtype: bfloat16
layers: [0, 0.5]
corpora: [news]
"""
CORPUS = """
name: news
kind: chat
source: {path: texts/news.jsonl}
first_exchange_only: true
"""
ORGANISM = """
name: cake
type: false_facts
description: believes something about cakes
ground_truth: Believes that cakes are baked at 450 degrees.
key_facts: [450 degrees]
rubric: false_facts
expression: {pattern: '(?i)\\b450\\b', inside: ['How hot?'], outside: [Hello]}
training_corpus: {source: {repo: lab/cakes}, kind: text}
metadata: {tokens: 1000, tags: [a, b]}
variants:
  mini:
    default: {kind: lora, source: {repo: lab/cake, subfolder: step-10}, dilution: 0.5}
    twin: {kind: lora, source: {demo: cake/one}, against: {kind: lora, source: {demo: cake/two}}, corpora: [news]}
    same: {kind: identical}
"""
NULL_ORGANISM = """
name: nothing
type: generic
arm: identical
description: the base itself
variants: {mini: {default: {kind: identical}}}
"""
ENTRIES = {
    "models/mini.yaml": MODEL,
    "corpora/news.yaml": CORPUS,
    "organisms/cake.yaml": ORGANISM,
    "organisms/nothing.yaml": NULL_ORGANISM,
}


def write(root: Path, entries: dict[str, str]) -> Path:
    for name, text in entries.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


@pytest.fixture
def root(tmp_path) -> Path:
    return write(tmp_path / "root", ENTRIES)


def problems(root: Path, *more: Path) -> list[str]:
    with pytest.raises(RegistryError) as caught:
        Registry.load(root, *more)
    return str(caught.value).splitlines()[1:]


def only_problem(root: Path, file: str, old: str, new: str) -> str:
    """The one line that changing `old` to `new` in one file leads to."""
    text = ENTRIES[file]
    assert old in text
    lines = problems(write(root, {file: text.replace(old, new, 1)}))
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"{root / file}: ")
    return lines[0].removeprefix(f"{root / file}: ")


def test_entries_and_pairs(root):
    registry = Registry.load(root)
    assert [pair.key for pair in registry.pairs()] == [
        "cake__mini__default",
        "cake__mini__same",
        "cake__mini__twin",
        "nothing__mini__default",
    ]
    assert registry.pairs("other") == ()
    assert registry.variant(Pair("mini", "cake")).dilution == 0.5
    assert registry.model("mini").layers == (0, 0.5)
    assert registry.corpus("news").column == "messages"
    assert registry.organism("nothing").key_facts == ()


def test_sources_resolve_to_a_path_or_a_hub_place(root):
    registry = Registry.load(root)
    assert registry.resolve(registry.corpus("news").source, "mini") == root / "texts" / "news.jsonl"
    assert registry.resolve(registry.model("mini").source, "mini") == HubRef("lab/mini", "main")
    source = registry.variant(Pair("mini", "cake")).source
    assert registry.resolve(source, "mini") == HubRef("lab/cake", subfolder="step-10")
    assert str(source) == "lab/cake/step-10"
    assert str(Source(demo="base")) == "demo artifact 'base'"


def test_folders_that_do_not_exist_are_empty(tmp_path):
    assert Registry.load(tmp_path / "nowhere").pairs() == ()


@pytest.mark.parametrize(
    ("ask", "expected"),
    [
        (lambda registry: registry.organism("cakes"), "no organism 'cakes' in the registry; did you mean 'cake'?"),
        (lambda registry: registry.model("zzz"), "no model 'zzz' in the registry; there are mini"),
        (lambda registry: registry.corpus("new"), "no corpus 'new' in the registry; did you mean 'news'?"),
        (lambda registry: registry.variant(Pair("big", "cake")), "no base model for cake 'big' in the registry"),
        (
            lambda registry: registry.variant(Pair("mini", "cake", "defualt")),
            "no variant of cake on mini 'defualt' in the registry; did you mean 'default'?",
        ),
    ],
)
def test_unknown_names_come_with_close_ones(root, ask, expected):
    with pytest.raises(RegistryError) as caught:
        ask(Registry.load(root))
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        ("models/mini.yaml", "dtype:", "dtpye:", "dtpye: unknown key; did you mean 'dtype'?"),
        (
            "organisms/cake.yaml",
            "dilution:",
            "dilutoin:",
            "variants.mini.default.dilutoin: unknown key; did you mean 'dilution'?",
        ),
        (
            "organisms/cake.yaml",
            "subfolder:",
            "folder:",
            "variants.mini.default.source.folder: unknown key; did you mean 'subfolder'?",
        ),
        ("models/mini.yaml", "bfloat16", "bf16", "dtype: Input should be 'float32', 'bfloat16', 'float16' or 'auto'"),
        ("models/mini.yaml", "bfloat16", "bf16", "found 'bf16'"),
        ("models/mini.yaml", "source: {repo: lab/mini, revision: main}\n", "", "source: missing; add a line like"),
        ("models/mini.yaml", "name: mini", "name: minni", "name: 'minni' in a file called mini.yaml"),
        ("models/mini.yaml", "name: mini", "name: mi__ni", "name 'mi__ni' is not usable"),
        ("models/mini.yaml", "name: mini", "name: a/b", "For example: 'a_b'"),
        ("models/mini.yaml", "[0, 0.5]", "[1.5]", "layer 1.5 is neither a layer number (0, 1, …) nor a fraction"),
        ("models/mini.yaml", "[news]", "[newz]", "corpora: no corpus 'newz'; did you mean 'news'?"),
        ("models/mini.yaml", "{repo: lab/mini, revision: main}", "{}", "exactly one of path, repo and demo, but none"),
        ("models/mini.yaml", "{repo:", "{demo: base, repo:", "but ['repo', 'demo'] is given"),
        ("models/mini.yaml", "{repo:", "{path:", "revision and subfolder belong to a repo, but the source is a path"),
        ("models/mini.yaml", "lab/mini", "lab/mini/step", "{repo: owner/name, subfolder: step-100}"),
        ("organisms/cake.yaml", "step-10", "../up", "subfolder '../up' leaves the repository"),
        ("organisms/cake.yaml", "  mini:", "  minni:", "variants.minni: no model 'minni'; did you mean 'mini'?"),
        ("organisms/cake.yaml", "corpora: [news]", "corpora: [x]", "variants.mini.twin.corpora: no corpus 'x'"),
        ("organisms/cake.yaml", "rubric: false_facts\n", "", "rubric missing, without which arm organism cannot be"),
        ("organisms/cake.yaml", "key_facts: [450 degrees]\n", "", "key_facts missing"),
        ("organisms/cake.yaml", "rubric: false_facts", "rubric: facts", "no packaged rubric 'facts'; there are"),
        ("organisms/cake.yaml", "rubric:", "rubric_text: x\nrubric:", "both rubric and rubric_text are given"),
        ("organisms/cake.yaml", "'(?i)", "'(((", "expression.pattern: '(((\\\\b450\\\\b' is not a regular expression"),
        ("organisms/cake.yaml", "type: false_facts", "type: lies", "type: Input should be 'false_facts', 'misal"),
        (
            "organisms/cake.yaml",
            "same: {kind: identical}",
            "same: {kind: identical, source: {demo: x}}",
            "kind identical is the base model itself and takes no source",
        ),
        ("organisms/cake.yaml", "same: {kind: identical}", "same: {kind: full}", "kind full needs a source"),
        ("organisms/cake.yaml", "    same:", "    a|b:", "'a|b' is not usable"),
        (
            "organisms/nothing.yaml",
            "{mini: {default: {kind: identical}}}",
            "{mini: {}}",
            "variants: no variant of some model; expected at least one, for example",
        ),
        ("corpora/news.yaml", "kind: chat", "kind: text", "first_exchange_only, pre_assistant_tokens and thinking have a"),
        ("corpora/news.yaml", "source: {path: texts/news.jsonl}", "", "a corpus has source or texts, but neither is"),
        ("corpora/news.yaml", "kind: chat", "kind: chat\ntexts: [a]", "a corpus has source or texts, but both are given"),
        ("corpora/news.yaml", CORPUS, "name: news\nkind: chat\ntexts: [a b]", "texts are plain texts without subsets"),
        ("models/mini.yaml", "dtype:", "template_options: {enable_thinking: false}\ndtype:", "write thinking: false"),
        ("models/mini.yaml", "dtype:", "parameters: 3\ndtype:", "parameters: unknown key"),
        ("models/mini.yaml", "[0, 0.5]", "[]", "no layer at all; leave the line out to read every layer"),
        ("organisms/cake.yaml", "dilution: 0.5", "dtype: float32", "kind lora runs in the number format of the base: set"),
        ("organisms/cake.yaml", "{kind: identical}", "{kind: identical, dtype: float32}", "dtype is for whole checkpoints"),
        ("corpora/news.yaml", "name: news", "name: news\nkind: text", "line 4: key 'kind' was already given in line 3"),
        ("corpora/news.yaml", "kind: chat", "kind: chat: text", "line 3: not YAML (mapping values are not allowed"),
        ("corpora/news.yaml", CORPUS, "", "the file is empty; begin with name: news"),
        ("corpora/news.yaml", CORPUS, "- name: news", "a list at top level; expected one entry as a mapping"),
    ],
)
def test_a_mistake_is_told_with_file_field_and_remedy(root, file, old, new, expected):
    assert expected in only_problem(root, file, old, new)


@pytest.mark.parametrize("name", ["..", "a'b", "a\\tb", "a b"])
def test_unsafe_names_are_refused(root, name):
    line = only_problem(root, "organisms/nothing.yaml", "name: nothing", f'name: "{name}"')
    assert "is not usable" in line


def test_a_corpus_may_not_be_called_as_training_corpora_are(root):
    write(root, {"corpora/training.yaml": CORPUS.replace("name: news", "name: training")})
    assert "'training' is what an organism's training_corpus is called; take another one" in problems(root)[0]


def test_probes_are_those_of_the_variant_or_the_model_and_training_only_where_asked_for(root):
    def names(registry, variant):
        return [corpus.name for corpus in registry.probes(Pair("mini", "cake", variant))]

    none_of_its_own = ORGANISM.replace("corpora: [news]", "corpora: []")
    registry = Registry.load(write(root, {"organisms/cake.yaml": none_of_its_own}))
    assert (names(registry, "default"), names(registry, "twin")) == (["news"], [])
    asked = ORGANISM.replace("kind: text}", "kind: text, probe: true, splits: [train, test], column: body}")
    registry = Registry.load(write(root, {"organisms/cake.yaml": asked}))
    assert names(registry, "default") == ["news", "training"]
    training = registry.probes(Pair("mini", "cake"))[-1]
    assert (training.source.repo, training.kind, training.column) == ("lab/cakes", "text", "body")
    assert training.split == "train+test"


def test_texts_of_an_entry_have_no_place(root):
    write(root, {"corpora/own.yaml": "name: own\nkind: text\ntexts:\n- one text\n- 'another: text'\n"})
    registry = Registry.load(root)
    assert registry.corpus("own").texts == ("one text", "another: text")
    assert registry.place_of(registry.corpus("own"), "mini") is None
    assert registry.place_of(registry.corpus("news"), "mini") == root / "texts" / "news.jsonl"


def test_file_that_is_not_utf8_and_file_with_another_ending(root):
    (root / "corpora" / "news.yaml").write_bytes(b"name: n\xffews")
    (root / "corpora" / "more.yml").write_text(CORPUS)
    first, second = problems(root)
    assert "more.yml: registry files end in .yaml; rename it" in first
    assert "news.yaml: not UTF-8" in second


def test_one_name_in_two_roots_names_both_files(root, tmp_path):
    other = write(tmp_path / "other", {"models/mini.yaml": MODEL})
    [line] = problems(root, other)
    expected = f"{other / 'models/mini.yaml'}: models 'mini' is already in {root / 'models/mini.yaml'}; rename one"
    assert line.startswith(expected)


def test_all_problems_of_all_files_are_told_at_once(root):
    write(root, {"models/mini.yaml": "name: mini\nsorce: x\n", "organisms/cake.yaml": ORGANISM.replace("lora", "lroa")})
    lines = problems(root)
    assert len(lines) == 5
    assert any("sorce: unknown key; did you mean 'source'?" in line for line in lines)
    assert any("source: missing" in line for line in lines)
    assert sum("kind: Input should be 'lora', 'full' or 'identical', found 'lroa'" in line for line in lines) == 3


def test_unknown_arm_needs_no_truth(root):
    text = ORGANISM.replace("type: false_facts", "type: generic\narm: unknown")
    for line in ("ground_truth", "key_facts", "rubric"):
        text = "\n".join(kept for kept in text.splitlines() if not kept.startswith(line))
    assert Registry.load(write(root, {"organisms/cake.yaml": text})).organism("cake").ground_truth is None


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DIFFING_HOME", str(tmp_path / "home"))
    own = {name: text for name, text in ENTRIES.items() if not name.startswith("organisms")}
    write(tmp_path / "home" / "registry", own)
    return tmp_path / "home" / "registry"


def test_the_default_registry_reads_the_home_folder(home):
    assert "mini" in load_registry().models


def test_add_organism_validates_and_copies(home, tmp_path):
    file = write(tmp_path, {"cake.yaml": ORGANISM}) / "cake.yaml"
    assert add_organism(file).name == "cake"
    assert [path.name for path in (home / "organisms").iterdir()] == ["cake.yaml"]
    assert "cake" in load_registry().organisms
    with pytest.raises(RegistryError, match="organisms 'cake' is already in"):
        add_organism(file)


def test_add_organism_copies_nothing_that_is_not_valid(home, tmp_path):
    file = write(tmp_path, {"cake.yaml": ORGANISM.replace("  mini:", "  huge:")}) / "cake.yaml"
    with pytest.raises(RegistryError, match=r"cake.yaml: variants.huge: no model 'huge'"):
        add_organism(file)
    assert not (home / "organisms").exists()
