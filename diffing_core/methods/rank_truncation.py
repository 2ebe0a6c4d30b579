"""What the finetune says when only the leading directions of its change are left, and what the rest says without them.

    copy of rank k:  W_base + c · U_k U_kᵀ ΔW        rest:  W_base + (ΔW − U_k U_kᵀ ΔW)        of every matrix
    share_kept = 1 − KL(tuned ‖ copy) / KL(tuned ‖ base), at the places that the tuned model's own texts visit

Training leaves a change of low stable rank ‖ΔW‖_F²/σ₁²: what was taught lies in few directions, and what was taught
afterwards to hide it often in the lesser ones. A copy may therefore say what the tuned model does not. c is a number, or
`keep`: each matrix scaled to the norm of its whole change. Changes of norms and biases have no directions; copies are
without them and rests have them whole.

Block by block, the change of attention or of the MLP is taken away and the rest kept: how much of the way back to the base
that goes says where the change sits, which its size in the weights does not.

Words are tested for a trend over base, copies and tuned model (word_trends.py) with the energy Σσ² that each has of the
change as its dose, answer by answer; `z_over_tuned` compares the copies with the tuned model. A copy whose texts are too
unlikely under the base counts for no trend.

Reference: Mantel 1963; Eckart and Young 1936; Roy and Vetterli 2007.
"""

import itertools
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, get_args

import pyarrow as pa
from pydantic import Field

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
from diffing_core.figures import Figure
from diffing_core.findings import Finding
from diffing_core.methods.base import Inputs, Method, Need, Tables
from diffing_core.methods.kl_rollout import scored
from diffing_core.methods.weight_diff.declaration import EXPERT
from diffing_core.models import ModelPair
from diffing_core.tables import Column, TableSpec
from diffing_core.tensor_names import Part, place_of
from diffing_core.weight_edits import Term, edited_subject, left_out, uniform
from diffing_core.weight_edits.adapter_folder import AdaptableModules
from diffing_core.weight_edits.changes import change_of, n_layers, spectrum_of, terms_on_registered_base
from diffing_core.weight_edits.folders import fits_adapter
from diffing_core.weight_edits.specification import LayerAmplification, ModuleAmplification
from diffing_core.weights import OpenPair, WeightPair, weight_stream
from diffing_core.word_trends import word_trends

NATS = "nats/token"
COPY, REST = "copy", "rest"
Rank = Annotated[int, Field(ge=1)]
Scale = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class RankTruncationSettings(AskedSettings):
    """Knobs of `rank_truncation`; every rank is tried at every scale."""

    ranks: tuple[Rank | Literal["full"], ...] = Field(
        (1, 2, 4), min_length=1, description="Directions kept of every matrix; full: all of them, scaled alone."
    )
    scales: tuple[Scale | Literal["keep"], ...] = Field(
        (1.0,), min_length=1, description="What copies are multiplied with; keep: the norm of the whole change."
    )
    rests: tuple[Rank, ...] = Field((1,), description="Ranks that are taken away, the rest being asked as a control.")
    kl_samples: int = Field(1, ge=1, description="Of these answers, how many of the tuned model's are where KL is measured.")
    ablated: tuple[Literal["all", "attention", "mlp"], ...] = Field(
        ("attention", "mlp"), description="Modules whose change is taken away in one block after the other; none: no ablation."
    )
    ablate_checkpoints: bool = Field(
        False, description="Whether blocks are ablated too where every ablation is a whole checkpoint, which is written and loaded."
    )
    texts_with_words: bool = Field(True, description="Whether a text is shown only if one of the shown words is in it.")


MODELS = TableSpec(
    "rank_truncation_models",
    "The models that were asked, and how much of the tuned model's behaviour each has.",
    ("side",),
    (
        SIDE,
        Column("kind", "string", "base, tuned, copy (of leading directions) or rest (without them)."),
        Column("rank", "int32", "Directions kept or taken away; null where all are there.", nullable=True),
        Column("scale", "string", "Factor of the change, or keep.", nullable=True),
        Column("energy_share", "float64", "Share of the matrices' ‖ΔW‖_F² that is left, before scaling.", low=0, high=1),
        Column("kl_nats", "float64", "Mean KL(tuned ‖ model) where the tuned model's texts go.", NATS, "effect", low=0),
        Column("share_kept", "float64", "1 − kl_nats over that of the base; null where the base has none.", "", "effect",
               nullable=True, high=1),
        Column("in_trend", "bool", "Whether it counts for the trends of words."),
        Column("n_tokens", "int64", "Tokens at which it was measured.", role="count", low=0),
        LEFT_OUT,
    ),
)  # fmt: skip
MODULES = TableSpec(
    "rank_truncation_modules",
    "On how few directions the change of each matrix lies, and what each rank keeps of it.",
    ("name", "expert", "rank"),
    (
        Column("name", "string", "Tensor.", role="key"),
        EXPERT,
        Column("rank", "int32", "Directions kept.", role="key", low=1),
        Column("layer", "int32", "Block, from 0; null outside of blocks.", nullable=True),
        Column("part", "string", "attn, mlp, norm, embed, head or other."),
        Column("frobenius", "float64", "‖ΔW‖_F of the whole change.", "", "effect", low=0),
        Column("stable_rank", "float64", "‖ΔW‖_F²/σ₁² of the whole change.", "", "effect", low=0),
        Column("energy_share", "float64", "Share of ‖ΔW‖_F² in the leading directions.", "", "effect", low=0, high=1.0001),
    ),
)
BLOCKS = TableSpec(
    "rank_truncation_blocks",
    "How far the tuned model goes back towards the base if the change of one block's modules is taken away, all others staying.",
    ("layer", "modules"),
    (
        Column("layer", "int32", "Block, from 0.", role="key", low=0),
        Column("modules", "string", "attention, mlp or all of the block.", role="key"),
        Column("kl_nats", "float64", "Mean KL(tuned ‖ model) where the tuned model's texts go.", NATS, "effect", low=0),
        Column("share_lost", "float64", "kl_nats over that of the base; null where the base has none.", "", "effect",
               nullable=True, low=0),
    ),
)  # fmt: skip
SAMPLES = samples_spec("rank_truncation")
COHERENCE = coherence_spec("rank_truncation")
WORDS = TableSpec(
    "rank_truncation_words",
    "Words and how their use goes with the energy that is left of the change; what rises most comes first.",
    ("word",),
    (
        Column("word", "string", "Lower-cased. From models under test: untrusted.", role="key"),
        Column("n_texts_base", "int32", "Answers of the base with the word.", role="count", low=0),
        Column("n_texts_tuned", "int32", "Answers of the tuned model with it.", role="count", low=0),
        Column("n_texts_copies", "list<int32>", "Answers of each copy with it, in the order of the models.", role="count"),
        Column("n_texts_rests", "list<int32>", "Answers of each rest with it.", role="count"),
        Column("z", "float64", "Mantel's trend test over base, copies and tuned model; positive: it comes with the change.", "z", "effect"),
        Column("z_over_tuned", "float64", "The same test, copies against tuned model.", "z", "effect"),
        Column("p_value", "float64", "Of z, two-sided.", low=0, high=1),
        Column("q_value", "float64", "p_value after Benjamini–Hochberg over the listed words.", low=0, high=1),
    ),
)


@dataclass(frozen=True)
class Cut:
    """One edited model: what is left of the change, and how it is scaled."""

    kind: str
    rank: int | None
    scale: float | Literal["keep"]

    @property
    def name(self) -> str:
        """For example rank1, rank1_x2, rank1_keep, full_x2 or rest1."""
        kept = "full" if self.rank is None else f"{'rest' if self.kind == REST else 'rank'}{self.rank}"
        return kept if self.scale == 1 else f"{kept}_{'' if self.scale == 'keep' else 'x'}{str(self.scale).removesuffix('.0')}"

    def term(self, files: WeightPair) -> Term:
        """The change to be added."""
        keep = self.scale == "keep"
        weight = uniform(1.0 if keep else self.scale)
        return Term(files, weight, self.rank, residual=self.kind == REST, keep_norm=keep and self.rank is not None)


def cuts(settings: RankTruncationSettings) -> list[Cut]:
    """The edited models that the settings ask for; the tuned model itself is not made again."""
    ranks = [None if rank == "full" else rank for rank in settings.ranks]
    copies = [Cut(COPY, rank, scale) for rank in ranks for scale in settings.scales]
    rests = [Cut(REST, rank, 1.0) for rank in settings.rests]
    return [cut for cut in dict.fromkeys((*copies, *rests)) if cut.rank is not None or cut.scale not in (1.0, "keep")]


def run(inputs: Inputs, settings: RankTruncationSettings) -> Tables:
    """Asks base, tuned model, copies and rests, and measures how far each is from the tuned model.

    Raises:
        NotComputableError: no prompt can be asked, or a change that cannot be edited.
    """
    pair: ModelPair = inputs[Need.MODELS]
    files: WeightPair = inputs[Need.WEIGHTS]
    prompts = settings.parsed_prompts()
    sampling = settings.sampling()
    edits = cuts(settings)
    modules = _modules(files, sorted({cut.rank for cut in edits if cut.rank is not None}))
    models = [("base", nullcontext(pair.base)), ("tuned", nullcontext(pair.tuned))]
    answers = ask(pair, models, prompts, sampling, settings.seed)
    written = [each for each in answers[1].made if each.sample < settings.kl_samples]
    distances = {"base": _distance(pair, written)}
    for cut in edits:
        with edited_subject(pair, cut.term(files)) as subject:
            answers += ask(pair, [(cut.name, nullcontext(subject))], prompts, sampling, settings.seed)
            distances[cut.name] = _distance(replace(pair, base=subject), written)
    energies = _energies(edits, modules)
    kept = [each.is_language_beside(answers[1], settings.max_loss_nats) for each in answers[2:]]
    counted = [cut.name for cut, is_kept in zip(edits, kept, strict=True) if is_kept and cut.kind == COPY]
    words, z = _words_table(answers, edits, [(each, energies[each]) for each in counted], settings.min_samples)
    blocks = _blocks(pair, files, written, distances["base"][0], settings)
    return {
        BLOCKS.name: BLOCKS.table({name: [row[name] for row in blocks] for name in BLOCKS.schema.names}),
        MODELS.name: _models_table(edits, distances, energies, counted, left_out([Term(files)])),
        MODULES.name: MODULES.table({name: [row[name] for row in modules] for name in MODULES.schema.names}),
        SAMPLES.name: samples_table(SAMPLES, answers, pair, prompts, z),
        COHERENCE.name: coherence_table(COHERENCE, answers),
        WORDS.name: words,
    }


def findings(tables: Tables, settings: RankTruncationSettings) -> list[Finding]:
    """Words that come with the energy of the change, then the copies' answers that are most made of them."""
    rising = [row for row in tables[WORDS.name].to_pylist() if row["z"] > 0 and row["q_value"] <= settings.max_q]
    copies = [row["side"] for row in tables[MODELS.name].to_pylist() if row["kind"] == COPY and row["in_trend"]]
    return findings_of(WORDS, rising, SAMPLES, tables[SAMPLES.name], copies, settings)


def headline(tables: Tables) -> dict[str, float | int | str]:
    """What the copy of least rank keeps, on how few directions the change lies, and how many words the copies raise."""
    models, modules = tables[MODELS.name].to_pylist(), tables[MODULES.name].to_pylist()
    words = tables[WORDS.name].to_pylist()
    copies = [row for row in models if row["kind"] == COPY]
    weight = sum(row["frobenius"] ** 2 for row in modules)
    return {
        **{f"share_kept_{row['side']}": row["share_kept"] for row in copies if row["share_kept"] is not None},
        "mean_stable_rank": sum(row["frobenius"] ** 2 * row["stable_rank"] for row in modules) / weight if weight else 0.0,
        "n_words_q05": sum(row["z"] > 0 and row["q_value"] < 0.05 for row in words),
        "n_words_beyond_tuned": sum(row["z"] > 0 and row["q_value"] < 0.05 and row["z_over_tuned"] > 2 for row in words),
    }


def _distance(pair: ModelPair, written: Sequence[Any]) -> tuple[float, int]:
    """Mean KL(tuned ‖ base) per token at the places visited by texts of the tuned model, and the number of these."""
    said = scored(pair, written)
    return (float(said["kl_nats"].mean()) if len(said) else 0.0), len(said)


def _modules(files: WeightPair, ranks: Sequence[int]) -> list[dict[str, Any]]:
    """A row per changed matrix and rank."""
    rows = []
    for delta in weight_stream(files):
        if len(delta.shape) != 2:
            continue
        spectrum = spectrum_of(change_of(delta), max(ranks, default=1))
        share_K = spectrum.energy_shares_K
        of_tensor = {
            "name": delta.name,
            "expert": delta.expert,
            "layer": delta.layer,
            "part": delta.part,
            "frobenius": spectrum.frobenius,
            "stable_rank": spectrum.stable_rank,
        }
        rows += [of_tensor | {"rank": rank, "energy_share": float(share_K[:rank].sum())} for rank in ranks]
    return rows


def _blocks(
    pair: ModelPair, files: WeightPair, written: Sequence[Any], of_base: float, settings: RankTruncationSettings
) -> list[dict[str, Any]]:
    """A row per block and modules; what a finetune does not change is known without a pass."""
    whole = terms_on_registered_base([Term(files)])
    if not settings.ablate_checkpoints and not fits_adapter(whole, AdaptableModules(pair.base.plain)):
        return []
    changed = {place_of(name)[:2] for name in OpenPair(files).names}
    parts = {"attention": {"attn"}, "mlp": {"mlp"}, "all": set(get_args(Part))}
    rows = []
    for layer, modules in itertools.product(range(n_layers(files.base)), settings.ablated):
        kl = 0.0
        if changed & {(layer, part) for part in parts[modules]}:
            without = ModuleAmplification(modules=modules, weight=0.0)
            term = Term(files, (LayerAmplification(layers=layer, module_amplifications=(without,)),))
            with edited_subject(pair, term) as subject:
                kl, _ = _distance(replace(pair, base=subject), written)
        rows.append({"layer": layer, "modules": modules, "kl_nats": kl, "share_lost": kl / of_base if of_base else None})
    return rows


def _energies(edits: Sequence[Cut], modules: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Share of ‖ΔW‖_F² that each model has, before scaling; all or nothing where no matrix changes."""
    total: dict[int, float] = {}
    kept: dict[int, float] = {}
    for row in modules:
        square = row["frobenius"] ** 2
        total[row["rank"]] = total.get(row["rank"], 0.0) + square
        kept[row["rank"]] = kept.get(row["rank"], 0.0) + square * row["energy_share"]
    energies = {"base": 0.0, "tuned": 1.0}
    for cut in edits:
        share = min(kept[cut.rank] / total[cut.rank], 1.0) if total.get(cut.rank) else 1.0
        energies[cut.name] = 1 - share if cut.kind == REST else share
    return energies


def _models_table(
    edits: Sequence[Cut],
    distances: dict[str, tuple[float, int]],
    energies: dict[str, float],
    counted: Sequence[str],
    lacking: list[str],
) -> pa.Table:
    of_base, n_tokens = distances["base"]
    kinds = {"base": ("base", None, None), "tuned": ("tuned", None, None)}
    kinds |= {cut.name: (cut.kind, cut.rank, str(cut.scale)) for cut in edits}
    kl = [0.0 if name == "tuned" else distances[name][0] for name in kinds]
    return MODELS.table(
        {
            "side": list(kinds),
            "kind": [kind for kind, _, _ in kinds.values()],
            "rank": [rank for _, rank, _ in kinds.values()],
            "scale": [scale for _, _, scale in kinds.values()],
            "energy_share": [energies[name] for name in kinds],
            "kl_nats": kl,
            "share_kept": [1 - each / of_base if of_base else None for each in kl],
            "in_trend": [name in ("base", "tuned", *counted) for name in kinds],
            "n_tokens": [n_tokens] * len(kinds),
            "left_out": [[] if kind in ("base", "tuned") else lacking for kind, _, _ in kinds.values()],
        }
    )


def _words_table(
    answers: Sequence[Answers], edits: Sequence[Cut], counted: Sequence[tuple[str, float]], min_samples: int
) -> tuple[pa.Table, dict[str, float]]:
    """The table of words, and z by word; `counted` are the copies that count, with their doses."""
    by_model = {each.model: each for each in answers}
    words = {name: each.words for name, each in by_model.items()}
    copies = [words[name] for name, _ in counted]
    doses = [0.0, *(dose for _, dose in counted), 1.0]
    trends = word_trends([words["base"], *copies, words["tuned"]], doses, min_samples)
    over_tuned = word_trends([words["tuned"], *copies], [0.0, *[1.0] * len(copies)], 1).z_of() if copies else {}

    def n_texts(model: str) -> list[int]:
        found = [set(each) for each in words[model]]
        return [sum(word in each for each in found) for word in trends.words]

    def side_by_side(kind: str) -> list[list[int]]:
        columns = [n_texts(cut.name) for cut in edits if cut.kind == kind]
        return [[column[place] for column in columns] for place in range(len(trends.words))]

    table = WORDS.table(
        {
            "word": trends.words,
            "n_texts_base": n_texts("base"),
            "n_texts_tuned": n_texts("tuned"),
            "n_texts_copies": side_by_side(COPY),
            "n_texts_rests": side_by_side(REST),
            "z": trends.z_W,
            "z_over_tuned": [over_tuned.get(word, 0.0) for word in trends.words],
            "p_value": trends.p_W,
            "q_value": trends.q_W,
        }
    )
    return table, trends.z_of()


METHOD = Method(
    name="rank_truncation",
    version="4",
    kind="live",
    needs=frozenset({Need.MODELS, Need.WEIGHTS}),
    settings=RankTruncationSettings,
    tables=(MODELS, MODULES, BLOCKS, SAMPLES, COHERENCE, WORDS),
    reference="Mantel 1963; Eckart and Young 1936; Roy and Vetterli 2007",
    findings=findings,
    headline=headline,
    run=run,
    figures=(Figure("heatmap", "Share lost without the change of one block's modules", BLOCKS, "layer", "share_lost", "modules"),),
)
