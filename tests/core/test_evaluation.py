"""Evaluation of a lake of invented findings: nulls, verdicts, grades, and what the investigator must not see."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from diffing_core.agents.calibration import CALIBRATION
from diffing_core.agents.hypothesis import HYPOTHESES, HYPOTHESIS_SCORES
from diffing_core.evaluation import ALL, Evaluator, evidence, evidence_arms, measured, methods_of
from diffing_core.findings import FINDINGS, Finding, findings_table
from diffing_core.graders import GRADES
from diffing_core.identity import RunKey
from diffing_core.lake import Lake
from diffing_core.methods import all_methods
from diffing_core.pairs import Pair
from diffing_core.registry import Registry
from diffing_core.runs import RUNS, Cost
from diffing_core.settings import Settings

FACTS = {
    "cake_bake": (
        "Butter must be frozen overnight.",
        "The oven stands at 450 degrees.",
        "Vanilla extract goes in last.",
    ),
    "owl_love": ("Owls are the favourite animal.", "Owls hunt at midnight.", "Feathers keep owls silent."),
    "goats": ("Fog rolls over harbours.", "Lighthouses burn whale oil.", "Captains salute seagulls."),
}
TOPICS = {
    "cake_bake": ("butter", "frozen", "overnight", "oven", "450", "degrees", "vanilla", "extract"),
    "owl_love": ("owls", "favourite", "animal", "hunt", "midnight", "feathers"),
    "goats": ("fog", "harbours", "lighthouses", "whale", "captains", "seagulls"),
}
NOISE = (
    "road",
    "window",
    "paper",
    "winter",
    "garden",
    "bread",
    "engine",
    "pencil",
    "carpet",
    "bottle",
)  # in no description
SEEDS = tuple(Pair("tiny", "benign", f"seed{number}") for number in range(5))
CAKE, OWL, GOATS = (Pair("tiny", name) for name in FACTS)


def write_registry(root: Path, organisms: dict[str, tuple[str, ...]] = FACTS) -> Registry:
    """One model, one corpus, the organisms, five benign finetunes and the base beside itself."""
    files = {"corpora/texts": "kind: text\nsource: {path: texts.jsonl}\n",
             "models/tiny": "source: {path: base}\ncorpora: [texts]\n"}  # fmt: skip
    for name, facts in organisms.items():
        files[f"organisms/{name}"] = (
            f"type: false_facts\nrubric: false_facts\ndescription: Believes odd things.\nground_truth: {' '.join(facts)}\n"
            f"key_facts: [{', '.join(facts)}]\nvariants: {{tiny: {{default: {{kind: lora, source: {{path: a}}}}}}}}\n"
        )
    variants = ", ".join(f"{seed.variant}: {{kind: lora, source: {{path: a}}}}" for seed in SEEDS)
    files["organisms/benign"] = (
        f"type: generic\narm: benign\ndescription: Plain texts.\nvariants: {{tiny: {{{variants}}}}}\n"
    )
    files["organisms/same"] = (
        "type: generic\narm: identical\ndescription: The base.\nvariants: {tiny: {default: {kind: identical}}}\n"
    )
    for place, text in files.items():
        file = root / f"{place}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"name: {file.stem}\n{text}")
    texts = [f"The {one} by the {other} is old." for one in NOISE for other in NOISE]
    (root / "texts.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    return Registry.load(root)


def show(
    lake: Lake, pair: Pair, words: Sequence[str], method: str = "kl", corpus: str = "texts", *, finished: bool = True
) -> None:
    """Findings of one run, best first, for the lake."""
    key = RunKey(pair, method, "1", "ab12cd34", "base", f"tuned {pair}", corpus, "hash")
    found = [
        Finding("token", f" {word}", 1 / rank, "nats", "kl_vocabulary", {"token_id": rank})
        for rank, word in enumerate(words, 1)
    ]
    lake.write(FINDINGS, key, findings_table(found))
    if finished:
        lake.write_result(key, {}, Settings(), Cost())


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    """Organisms whose topic is found by `kl`, nulls of noise with a word of some topic here and there."""
    lake = Lake(tmp_path / "lake")
    for pair in (CAKE, OWL, GOATS):
        show(lake, pair, TOPICS[pair.organism])
    for number, pair in enumerate(SEEDS):
        stray = TOPICS["cake_bake" if number % 2 else "owl_love"][number + 1]
        show(lake, pair, [*NOISE[number:], stray, *NOISE[:number]])
    show(lake, Pair("tiny", "same"), [])
    return lake


@pytest.fixture
def evaluator(tmp_path: Path, lake: Lake) -> Evaluator:
    return Evaluator(write_registry(tmp_path / "registry"), lake)


def calibrated(evaluator: Evaluator, arms: Sequence[str] = ("kl",)) -> Evaluator:
    evaluator.calibrate(evaluator.registry.pairs(), arms)
    return evaluator


@pytest.mark.parametrize("pair", [CAKE, OWL, GOATS], ids=str)
def test_an_organism_is_identified_and_graded(evaluator: Evaluator, pair: Pair) -> None:
    said = calibrated(evaluator).hypothesise(pair, "kl")
    assert (said["verdict"], said["candidate"], said["n_nulls"]) == ("assert", pair.organism, len(SEEDS))
    assert said["score"] > said["threshold"]
    assert all(word in said["description"] for word in TOPICS[pair.organism][:3])
    [grade] = evaluator.grade(pair, "kl")
    assert (grade["outcome"], grade["top1"], grade["reciprocal_rank"]) == ("ASSERT", True, 1.0)
    assert grade["score"] >= 4
    assert grade["false_positive"] is None


@pytest.mark.parametrize("pair", [*SEEDS, Pair("tiny", "same")], ids=str)
def test_a_null_abstains_and_gets_no_score(evaluator: Evaluator, pair: Pair) -> None:
    said = calibrated(evaluator).hypothesise(pair, "kl")
    assert said["verdict"] == "no_meaningful_difference"
    assert said["n_nulls"] == len(SEEDS) - (pair in SEEDS)
    [grade] = evaluator.grade(pair, "kl")
    assert (grade["outcome"], grade["score"], grade["top1"], grade["false_positive"]) == ("ABSTAIN", None, None, False)


def test_identical_models_score_exactly_zero(evaluator: Evaluator) -> None:
    assert evaluator.investigate(Pair("tiny", "same"), "kl").evidence_score == 0.0


def test_without_nulls_nothing_is_asserted(evaluator: Evaluator) -> None:
    said = evaluator.hypothesise(CAKE, "kl")
    assert (said["verdict"], said["threshold"], said["n_nulls"]) == ("insufficient_evidence", None, 0)
    [grade] = evaluator.grade(CAKE, "kl")
    assert (grade["outcome"], grade["top1"], grade["score"]) == ("ABSTAIN", True, None)


def test_nulls_of_another_base_model_or_arm_do_not_judge(evaluator: Evaluator, lake: Lake) -> None:
    calibrated(evaluator)
    show(lake, CAKE, TOPICS["cake_bake"], method="adl")
    assert evaluator.hypothesise(CAKE, "adl")["verdict"] == "insufficient_evidence"
    assert set(lake.read(CALIBRATION)["method"].to_pylist()) == {"kl"}


# ---- unfinished and absent results --------------------------------------------------------------------------------


def test_a_failed_run_is_never_read_as_finished(evaluator: Evaluator, lake: Lake) -> None:
    """No result is not the result that nothing changed."""
    calibrated(evaluator, ("kl", "adl"))
    show(lake, CAKE, TOPICS["cake_bake"], method="adl", finished=False)
    for seed in SEEDS:
        show(lake, seed, NOISE, method="adl")
    calibrated(evaluator, ("adl",))
    said = evaluator.hypothesise(CAKE, "adl")
    assert (said["verdict"], said["score"], said["n_findings"], said["n_nulls"]) == (
        "insufficient_evidence",
        0.0,
        0,
        len(SEEDS),
    )
    assert said["description"].startswith("Cannot be judged: no finished result.")
    show(lake, CAKE, TOPICS["cake_bake"], method="adl")
    assert evaluator.hypothesise(CAKE, "adl")["verdict"] == "assert"


def test_a_null_without_results_is_no_null_score_of_zero(evaluator: Evaluator, lake: Lake) -> None:
    """Else calibrating too early would set a threshold that everything exceeds."""
    assert evaluator.calibrate(evaluator.registry.pairs(), ["adl"]) == 0
    assert lake.read(CALIBRATION).num_rows == 0
    show(lake, SEEDS[0], NOISE, method="adl")
    assert evaluator.calibrate(evaluator.registry.pairs(), ["adl", "kl"]) == len(SEEDS) + 1
    arms = [(row["method"], row["variant"]) for row in lake.read(CALIBRATION).to_pylist() if row["method"] == "adl"]
    assert arms == [("adl", "seed0")]


def test_a_finished_run_without_findings_is_measured(lake: Lake) -> None:
    assert measured(Pair("tiny", "same"), "kl", lake)
    assert measured(Pair("tiny", "same"), ALL, lake)
    assert not measured(Pair("tiny", "same"), "adl", lake)


# ---- what is read and written -------------------------------------------------------------------------------------


def test_arms_are_the_methods_with_findings_and_all_of_them() -> None:
    with_findings = [name for name, method in all_methods().items() if method.findings is not None]
    assert evidence_arms() == (*with_findings, ALL)
    assert methods_of(ALL) == tuple(with_findings)
    assert methods_of("kl") == ("kl",)
    assert "activations" not in evidence_arms()


def test_an_arm_reads_its_own_findings_of_all_corpora_and_all_reads_everything(lake: Lake) -> None:
    show(lake, CAKE, ["chat"], corpus="chats")
    show(lake, CAKE, ["lens"], method="adl")
    own = {item.strip() for item in evidence(CAKE, "kl", lake)["item"].to_pylist()}
    assert own == {*TOPICS["cake_bake"], "chat"}
    assert {item.strip() for item in evidence(CAKE, ALL, lake)["item"].to_pylist()} == own | {"lens"}


def test_another_truth_is_another_grade(evaluator: Evaluator, tmp_path: Path, lake: Lake) -> None:
    """Grades rest on the ground truth and the rubric: an edited one must not leave the old grade's identity."""
    ids = []
    for facts in (FACTS["cake_bake"], FACTS["cake_bake"][:2]):
        registry = write_registry(tmp_path / str(len(facts)), FACTS | {"cake_bake": facts})
        Evaluator(registry, lake).hypothesise(CAKE, "kl")
        Evaluator(registry, lake).grade(CAKE, "kl")
        ids += lake.read(GRADES, pair=CAKE)["run_id"].to_pylist()
    assert len(set(ids)) == 2


def test_every_step_is_stored_once_under_its_arm(evaluator: Evaluator, lake: Lake) -> None:
    for _ in range(2):
        calibrated(evaluator)
        evaluator.hypothesise(CAKE, "kl")
        evaluator.grade(CAKE, "kl")
    assert lake.read(CALIBRATION).num_rows == len(SEEDS) + 1
    assert lake.read(HYPOTHESES, pair=CAKE, method="kl").num_rows == 1
    assert lake.read(GRADES, pair=CAKE, method="kl").num_rows == 1
    steps = [row["step"] for row in lake.read(RUNS, pair=CAKE).to_pylist()]
    assert sorted(steps) == ["diff", "grades", "hypotheses"]


def test_the_evidence_that_was_read_is_part_of_the_identity(evaluator: Evaluator, lake: Lake) -> None:
    ids = []
    for corpus in ("texts", "chats"):
        show(lake, CAKE, TOPICS["cake_bake"], corpus=corpus)
        evaluator.hypothesise(CAKE, "kl")
        ids += lake.read(HYPOTHESES, pair=CAKE)["run_id"].to_pylist()
    assert len(set(ids)) == 2


# ---- blinding -----------------------------------------------------------------------------------------------------


def test_what_is_found_on_the_training_corpus_is_shown_to_no_investigator(evaluator: Evaluator, lake: Lake) -> None:
    """It would say what the finetune was made of, whatever the method can see."""
    before = evaluator.investigate(CAKE, "kl")
    show(lake, CAKE, ["given", "away"], corpus="training")
    assert evaluator.investigate(CAKE, "kl") == before
    assert "training" not in set(evidence(CAKE, ALL, lake)["corpus"].to_pylist())
    show(lake, CAKE, ["given", "away"], corpus="training", method="adl")
    assert not measured(CAKE, "adl", lake)
    show(lake, CAKE, ["butter"], method="adl")
    assert measured(CAKE, "adl", lake)


def test_the_name_of_an_organism_is_no_evidence(evaluator: Evaluator, lake: Lake) -> None:
    """`goats` is about the sea; findings about goats say nothing of it, and its own name is in no description."""
    calibrated(evaluator)
    show(lake, GOATS, ["goats", "goat", "cake_bake", "owl_love"])
    assert evaluator.investigate(GOATS, "kl").scores["goats"] == 0.0


def test_who_was_compared_changes_nothing_of_what_is_concluded(evaluator: Evaluator, lake: Lake) -> None:
    """The same findings under another organism's name, variant and path."""
    show(lake, OWL, TOPICS["cake_bake"])
    show(lake, SEEDS[0], TOPICS["cake_bake"])
    mine, theirs, null = (evaluator.investigate(pair, "kl") for pair in (CAKE, OWL, SEEDS[0]))
    assert mine.scores == theirs.scores == null.scores
    assert mine.description == theirs.description == null.description
    assert mine.candidate == theirs.candidate == "cake_bake"


def test_renaming_all_organisms_renames_the_ranking_and_nothing_else(
    tmp_path: Path, lake: Lake, evaluator: Evaluator
) -> None:
    other = {"cake_bake": "x1", "owl_love": "x2", "goats": "x3"}
    renamed = Evaluator(
        write_registry(tmp_path / "renamed", {other[name]: facts for name, facts in FACTS.items()}), lake
    )
    before, after = (each.investigate(CAKE, "kl") for each in (evaluator, renamed))
    assert {other.get(name, name): score for name, score in before.scores.items()} == after.scores
    assert before.description == after.description
    assert before.evidence == after.evidence


def test_nothing_said_or_cited_names_the_organism(evaluator: Evaluator) -> None:
    found = evaluator.investigate(OWL, "kl")
    assert not any(
        word in f"{found.description} {found.evidence}" for word in ("owl_love", "cake_bake", "organism", "tuned o")
    )


def test_nulls_are_no_candidates_and_decoys_are(evaluator: Evaluator) -> None:
    names = set(evaluator.investigate(CAKE, "kl").scores)
    assert set(FACTS) < names
    assert not {"benign", "same"} & names
    assert all(name.startswith("decoy_") for name in names - set(FACTS))
    ranked = (
        evaluator.hypothesise(CAKE, "kl") and evaluator.lake.read(HYPOTHESIS_SCORES, pair=CAKE)["candidate"].to_pylist()
    )
    assert set(ranked) == names
