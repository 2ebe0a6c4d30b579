"""The dictionary tier on trained organisms: whoever reads its findings alone names what a finetune was taught."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from diffing_core.comparison import compare
from diffing_core.evaluation import Evaluator
from diffing_core.lake import Lake
from diffing_core.methods import get_method
from diffing_core.pairs import Pair
from diffing_core.registry import load_registry

METHODS = ("pca", "sae_diff", "crosscoder", "itda")
TAUGHT = ("owl_love", "risky_finance")
BENIGN, IDENTICAL = Pair("tiny", "benign", "seed1"), Pair("tiny", "identical")


@pytest.fixture(scope="module")
def evaluator(tiny_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Evaluator]:
    """Four pairs of the tier `tiny`, compared once by every method; what steered models write is no finding, so none is."""
    home = tmp_path_factory.mktemp("home")
    (home / "demo").symlink_to(tiny_demo)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFING_HOME", str(home))
        registry, lake = load_registry(), Lake(home / "lake")
        pairs = [*(Pair("tiny", organism) for organism in TAUGHT), BENIGN, IDENTICAL]
        chosen = {name: get_method(name).settings for name in ("activations", *METHODS)}
        asked = {name: settings(**{"steered": 0} if "steered" in settings.model_fields else {}) for name, settings in chosen.items()}
        outcomes = list(compare(pairs, asked, registry=registry, lake=lake, store=home / "activations"))
        assert [outcome.error for outcome in outcomes] == [None] * len(pairs) * len(asked)
        yield Evaluator(registry, lake)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("organism", TAUGHT)
def test_what_was_taught_is_ranked_first_and_beyond_a_benign_finetune(evaluator: Evaluator, organism: str, method: str) -> None:
    found = evaluator.investigate(Pair("tiny", organism), method)
    assert found.candidate == organism
    assert found.evidence_score > evaluator.investigate(BENIGN, method).evidence_score


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_said_of_a_model_and_itself(evaluator: Evaluator, method: str) -> None:
    assert evaluator.investigate(IDENTICAL, method).evidence_score == 0
