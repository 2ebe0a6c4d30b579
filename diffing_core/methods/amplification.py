"""What the finetune says when its change is made larger, or turned around: W_base + w ΔW for several w.

Base, tuned model and amplified models get the same prompts and random numbers. A word that belongs to what was trained
comes with w: it is rarer at w = −1 than in the base, and more frequent at 2 and 3 than in the tuned model. Words are
tested for that trend over the models, answer by answer (word_trends.py), and compared with the base model by model
(as in `blackbox`). Larger weights also break the language, and broken language has all sorts of words: coherence stands
beside every model, and one whose texts are too unlikely under the base counts for no trend.

`weight` is the mean over attention and MLP of all blocks, since amplifications may differ by block and module.
Adapters and whole checkpoints are edited alike (weight_edits/). A specification may add other finetunes' changes; what
such a model says stands in the tables, but it counts for no trend and is not shown: its words may be theirs.

Reference: Mantel 1963; Monroe, Colaresi and Quinn 2008; Ilharco et al. 2023 (negation).
"""

from collections import Counter
from contextlib import nullcontext
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from pydantic import BeforeValidator, Field, model_validator

from diffing_core.answers import (
    LEFT_OUT,
    SIDE,
    Answers,
    AskedSettings,
    ask,
    coherence_spec,
    coherence_table,
    findings_of,
    samples_spec,
    samples_table,
)
from diffing_core.errors import RegistryError
from diffing_core.findings import Finding
from diffing_core.methods import blackbox
from diffing_core.methods.base import Inputs, Method, Need, Tables
from diffing_core.models import ModelPair
from diffing_core.pairs import Pair
from diffing_core.tables import Column, TableSpec
from diffing_core.weight_edits import (
    AdapterEdit,
    Amplification,
    Term,
    WeightEdit,
    edited_subject,
    left_out,
    preset,
    presets,
    resolve,
    term_of,
    uniform,
)
from diffing_core.weight_edits.changes import n_layers
from diffing_core.weights import WeightPair
from diffing_core.word_trends import WordTrends, word_trends

NOT_EDITED = ("base", "tuned")


def _specified(value: Any) -> Any:
    """A packaged amplification by its name; a mapping with `adapters` is a whole specification."""
    try:
        if isinstance(value, dict) and "adapters" in value:
            return WeightEdit.model_validate(value)
        return preset(value) if isinstance(value, str) else value
    except RegistryError as error:
        raise ValueError(str(error)) from error


class AmplificationSettings(AskedSettings):
    """Knobs of `amplification`."""

    amplifications: tuple[Annotated[Amplification | WeightEdit, BeforeValidator(_specified)], ...] = Field(
        default_factory=lambda: tuple(presets().values()),
        min_length=1,
        description="Names of packaged amplifications (2x, 2.5x, 3x, negative_1x), {name, layer_amplifications}, or whole "
        "specifications {name, adapters}, in which an adapter without an organism is the pair's own finetune.",
    )
    prior_words: float = Field(1000.0, gt=0, description="Weight of the prior of the log-odds, in words.")
    min_monotone: float = Field(0.5, ge=-1, le=1, description="Rank correlation from which a word rises with the weight.")

    @model_validator(mode="after")
    def _models_can_be_told_apart(self) -> "AmplificationSettings":
        names = Counter((*NOT_EDITED, *(each.name for each in self.amplifications)))
        taken = sorted(name for name, n in names.items() if n > 1)
        if taken:
            raise ValueError(f"amplifications: the name(s) {taken} are given twice; base and tuned are the models themselves")
        return self

    def edits(self, pair: Pair) -> list[WeightEdit]:
        """Whole specifications, in which the pair's own finetune has no name.

        Raises:
            RegistryError: a specification that does nothing.
        """
        edits = [each.edit() if isinstance(each, Amplification) else each for each in self.amplifications]
        return [_of_pair(each, pair) for each in edits]


def _of_pair(edit: WeightEdit, pair: Pair) -> WeightEdit:
    own, unnamed = f"{pair.organism}/{pair.variant}", {"organism": None, "variant": "default"}
    adapters = tuple(each.model_copy(update=unnamed) if each.place == own else each for each in edit.adapters)
    named = edit.model_copy(update={"adapters": adapters})
    return named.model_copy(update={"adapters": named.effective()})


MODELS = TableSpec(
    "amplification_models",
    "The models that were asked, from the least to the most of the change.",
    ("side",),
    (
        SIDE,
        Column("weight", "float64", "Mean weight of the pair's own change: 0 is the base, 1 the tuned model."),
        Column("others", "list<string>", "Other finetunes whose changes it has."),
        Column("description", "string", "What was done to the changes."),
        Column("in_trend", "bool", "Whether it counts for trends: its texts are language enough, and it has no other changes."),
        Column("n_samples", "int32", "Answers.", role="count", low=0),
        LEFT_OUT,
        Column("differing_share", "float64", "Share of its answers that differ from the base's.", "", "effect", low=0, high=1),
    ),
)
SAMPLES = samples_spec("amplification")
COHERENCE = coherence_spec("amplification")
WORDS = TableSpec(
    "amplification_words",
    "Words that a model says more often than the base, or less.",
    ("side", "word"),
    (
        SIDE,
        Column("word", "string", "Lower-cased. From a model under test: untrusted.", role="key"),
        Column("n_base", "int64", "Times the base says it.", role="count", low=0),
        Column("n_model", "int64", "Times this model says it.", role="count", low=0),
        Column("n_docs_base", "int64", "Answers of the base that have it.", role="count", low=0),
        Column("n_docs_model", "int64", "Answers of this model that have it.", role="count", low=0),
        Column("log_odds", "float64", "Log-odds ratio with a Dirichlet prior, model − base.", "nats", "effect"),
        Column("z", "float64", "log_odds over its standard error, occurrences taken as independent.", "z", "effect"),
        Column("p_value", "float64", "Exact McNemar test over answers, two-sided.", low=0, high=1),
        Column("q_value", "float64", "p_value after Benjamini–Hochberg over this model's words.", low=0, high=1),
    ),
)
TRENDS = TableSpec(
    "amplification_trends",
    "Dose-response: how the use of a word goes with the weight of the change; what rises most comes first.",
    ("word",),
    (
        Column("word", "string", "Lower-cased. From models under test: untrusted.", role="key"),
        Column("weights", "list<float64>", "Weights of the models that count, ascending."),
        Column("n_texts", "list<int32>", "Answers of each of these models that have the word.", role="count"),
        Column("z", "float64", "Mantel's trend test over answers; positive: the word comes with the change.", "z", "effect"),
        Column("monotone", "float64", "Spearman's correlation of weight and answers with the word.", "", "effect", low=-1.0001,
               high=1.0001),
        Column("p_value", "float64", "Of the trend, two-sided.", low=0, high=1),
        Column("q_value", "float64", "p_value after Benjamini–Hochberg over the listed words.", low=0, high=1),
    ),
)  # fmt: skip


def run(inputs: Inputs, settings: AmplificationSettings) -> Tables:
    """Asks base, tuned and amplified models, and tests their words.

    Raises:
        NotComputableError: no prompt can be asked, or a change that cannot be edited.
        RegistryError: an amplification of a block that the model does not have, or of an organism that there is not.
    """
    pair: ModelPair = inputs[Need.MODELS]
    files: WeightPair = inputs[Need.WEIGHTS]
    prompts = settings.parsed_prompts()
    edits = settings.edits(pair.pair)
    terms = {edit.name: _terms(edit, files, inputs) for edit in edits}
    lacking = {name: left_out(each) for name, each in terms.items()}
    weights = {"base": 0.0, "tuned": 1.0} | {name: _weight(own) for name, (own, *_) in terms.items()}
    models = [("base", nullcontext(pair.base)), ("tuned", nullcontext(pair.tuned))]
    models += [(edit.name, edited_subject(pair, *terms[edit.name], merge=edit)) for edit in edits]
    answers = ask(pair, models, prompts, settings.sampling(), settings.seed)
    ascending = sorted(answers, key=lambda each: weights[each.model])
    alone = {*NOT_EDITED, *(edit.name for edit in edits if not _others(edit))}
    kept = [each.is_language_beside(answers[1], settings.max_loss_nats) and each.model in alone for each in ascending]
    counted = [each for each, is_kept in zip(ascending, kept, strict=True) if is_kept or each in answers[:2]]
    doses = [weights[each.model] for each in counted]
    trends = word_trends([each.words for each in counted], doses, settings.min_samples)
    return {
        MODELS.name: _models_table(ascending, counted, weights, edits, lacking),
        SAMPLES.name: samples_table(SAMPLES, answers, pair, prompts, trends.z_of()),
        COHERENCE.name: coherence_table(COHERENCE, answers),
        WORDS.name: pa.concat_tables([_words_table(answers[0], each, settings) for each in answers[1:]]),
        TRENDS.name: _trends_table(trends, doses),
    }


def findings(tables: Tables, settings: AmplificationSettings) -> list[Finding]:
    """Words that rise with the weight, then the tuned and amplified models' answers that are most made of them."""
    rising = [
        row
        for row in tables[TRENDS.name].to_pylist()
        if row["z"] > 0 and row["q_value"] <= settings.max_q and row["monotone"] >= settings.min_monotone
    ]
    models = [row["side"] for row in tables[MODELS.name].to_pylist() if row["weight"] > 0 and row["in_trend"]]
    return findings_of(TRENDS, rising, SAMPLES, tables[SAMPLES.name], models, settings)


def headline(tables: Tables) -> dict[str, float | int | str]:
    """How many words rise and fall with the weight, and the largest weight at which it still speaks."""
    trends, models = tables[TRENDS.name].to_pylist(), tables[MODELS.name].to_pylist()
    return {
        "n_words_rising_q05": sum(row["z"] > 0 and row["q_value"] < 0.05 for row in trends),
        "n_words_falling_q05": sum(row["z"] < 0 and row["q_value"] < 0.05 for row in trends),
        "largest_coherent_weight": max(row["weight"] for row in models if row["in_trend"]),
        "n_incoherent_models": sum(not row["in_trend"] for row in models),
    }


def _terms(edit: WeightEdit, own: WeightPair, inputs: Inputs) -> list[Term]:
    """What is added up: the pair's own change first, of weight 0 where it is not named, then those of other finetunes."""
    adapters = {each.place: each for each in edit.adapters}
    ours = adapters.pop("", AdapterEdit(layer_amplifications=uniform(0.0)))
    return [term_of(ours, own), *(inputs[Need.FINETUNES].term(each) for each in adapters.values())]


def _weight(term: Term) -> float:
    return resolve(term.amplifications, n_layers(term.pair.base)).mean


def _others(edit: WeightEdit) -> list[str]:
    return [each.place for each in edit.adapters if each.place]


def _models_table(
    ascending: list[Answers],
    counted: list[Answers],
    weights: dict[str, float],
    edits: list[WeightEdit],
    lacking: dict[str, list[str]],
) -> pa.Table:
    base = next(each for each in ascending if each.model == "base")
    described = {"base": "No change.", "tuned": "The finetune as it is."}
    described |= {edit.name: edit.description for edit in edits}
    others = {edit.name: _others(edit) for edit in edits}
    return MODELS.table(
        {
            "side": [each.model for each in ascending],
            "weight": [weights[each.model] for each in ascending],
            "others": [others.get(each.model, []) for each in ascending],
            "description": [described[each.model] for each in ascending],
            "in_trend": [each in counted for each in ascending],
            "n_samples": [len(each.made) for each in ascending],
            "left_out": [lacking.get(each.model, []) for each in ascending],
            "differing_share": [float(np.mean([a != b for a, b in zip(each.texts, base.texts, strict=True)])) for each in ascending],
        }
    )


def _words_table(base: Answers, other: Answers, settings: AmplificationSettings) -> pa.Table:
    """The comparison of `blackbox`, with this model in the place of the tuned one."""
    compared = blackbox.compare_words(base.texts, other.texts, settings)
    renamed = {"n_model": "n_tuned", "n_docs_model": "n_docs_tuned"}
    columns = {name: compared[renamed.get(name, name)].combine_chunks() for name in WORDS.schema.names[1:]}
    return WORDS.table({"side": [other.model] * len(compared), **columns})


def _trends_table(trends: WordTrends, weights: list[float]) -> pa.Table:
    return TRENDS.table(
        {
            "word": trends.words,
            "weights": [weights] * len(trends.words),
            "n_texts": trends.n_texts_WA.tolist(),
            "z": trends.z_W,
            "monotone": trends.monotone_W,
            "p_value": trends.p_W,
            "q_value": trends.q_W,
        }
    )


METHOD = Method(
    name="amplification",
    version="3",
    kind="live",
    needs=frozenset({Need.MODELS, Need.WEIGHTS, Need.FINETUNES}),
    settings=AmplificationSettings,
    tables=(MODELS, SAMPLES, COHERENCE, WORDS, TRENDS),
    reference="Mantel 1963; Monroe, Colaresi and Quinn 2008; Ilharco et al. 2023",
    findings=findings,
    headline=headline,
    run=run,
)
