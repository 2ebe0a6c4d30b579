"""Principal components of what finetuning changed, and of both models' own activations, exact.

Of the stored rows of one layer, for δ = h_tuned − h_base (`difference`), h_base (`base`) and h_tuned (`tuned`):

    C = mean (x − μ)(x − μ)ᵀ = Σ_k λ_k v_k v_kᵀ       λ₁ ≥ λ₂ ≥ …     explained share λ_k / Σ λ
    coordinate of a row: v_kᵀ (x − μ)                  float64 sums in one reading; with `centred` off, μ is 0

A component has no sign of its own: its entry of largest size is made positive, as in scikit-learn, and both ends are
read. The components of base − tuned are the same with coordinates of the other sign. `skewness` of the coordinates says
which end is the far one: positive if a few rows lie far out at the positive end. Findings are read at that end. A common
scale of all dimensions changes no component and no share, so there is no normalisation.

Tokens come through norm and head (see `diffing_core.direction_lens`), texts where coordinates are largest at either end,
and samples of the model with a component added to its residual stream.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from diffing_core.activation_pairs import PairedActivations, Selection
from diffing_core.blocks import pick_layers
from diffing_core.covariance import Covariance, Principal
from diffing_core.errors import NotComputableError
from diffing_core.examples import TopExamples, around_peak, examples_spec
from diffing_core.figures import Figure
from diffing_core.findings import Finding
from diffing_core.fit_reading import FitReading
from diffing_core.lens_tables import lens_spec, lens_table
from diffing_core.methods.base import Inputs, Method, Need, Tables
from diffing_core.row_settings import RowSettings
from diffing_core.steering import SteeringSettings, steering_spec, steering_table
from diffing_core.tables import Column, TableSpec

Target = Literal["difference", "base", "tuned"]
ENDS = {"positive": 1.0, "negative": -1.0}
ROUNDING = 1e-10  # variance below this share of all is no component
TOKENS_BEFORE, TOKENS_AFTER = 8, 2  # of a text, shown around the largest coordinate


class PcaSettings(SteeringSettings, RowSettings):
    """Knobs of `pca`."""

    layers: tuple[int | float, ...] | None = Field(None, description="Blocks to read; none means all that are stored.")
    targets: tuple[Target, ...] = Field(("difference", "base", "tuned"), description="What is decomposed.")
    centred: bool = Field(True, description="Whether the mean is taken off first; else the first component holds it.")
    components: int | None = Field(64, ge=1, description="Components listed; none means as many as the width.")
    read_components: int = Field(8, ge=1, description="Leading components whose tokens and texts are listed.")
    top_tokens: int = Field(20, ge=1, description="Tokens listed per component, head and sign.")
    min_probability: float = Field(
        1e-8, ge=0, le=1, description="Mean probability in some model that lets a token be listed which the corpus lacks."
    )
    example_targets: tuple[Target, ...] = Field(("difference",), description="Targets whose components get example texts.")
    examples: int = Field(5, ge=1, description="Texts per component and end.")
    steered: int = Field(2, ge=0, description="Leading components of the difference that are steered with, at both ends.")
    steering_layers: tuple[int | float, ...] | None = Field(
        (0.5,), description="Blocks that are steered, those of them that are read; none means all."
    )
    shown_layers: tuple[int | float, ...] | None = Field(
        None, description="Blocks whose tokens become findings; none means the deepest that is read."
    )
    shown_components: int = Field(4, ge=1, description="Leading components whose tokens become findings.")
    shown: int = Field(20, ge=1, description="Tokens shown as findings.")
    shown_texts: int = Field(1, ge=0, description="Texts shown as findings per component.")


LAYER = Column("layer", "int32", "Block whose output was read, from 0.", role="key")
TARGET = Column("target", "string", "difference (tuned − base), base or tuned.", role="key")
COMPONENT = Column("component", "int32", "1 has the largest variance.", role="key", low=1)
END = Column("end", "string", "positive: where coordinates are large; negative: where they are small.", role="key")
FITS = TableSpec(
    "pca_fits",
    "How much the activations of a layer vary, and over how many dimensions.",
    ("layer", "target"),
    (
        LAYER,
        TARGET,
        Column("n_layers", "int32", "Blocks of the model."),
        Column("n_tokens", "int64", "Rows decomposed.", role="count"),
        Column("n_outliers", "int64", "Rows left out for their norms.", role="count", low=0),
        Column("total_variance", "float64", "Σ λ: mean squared distance from μ.", "activation units²", low=0),
        Column("effective_dimension", "float64", "(Σ λ)² / Σ λ²; 0 where nothing varies.", "", low=0),
        Column("relative_variance", "float64", "Σ λ of δ over that of base; null for the other targets.", "", "effect", True, low=0),
        Column("mean_norm", "float64", "Norm of the mean row.", "activation units", low=0),
        Column("mean", "list<float32>", "The mean row itself.", "activation units"),
    ),
)
COMPONENTS = TableSpec(
    "pca_components",
    "Principal components with their variances; those of no variance are left out.",
    ("layer", "target", "component"),
    (
        LAYER,
        TARGET,
        COMPONENT,
        Column("variance", "float64", "λ.", "activation units²", low=0),
        Column("explained_share", "float64", "λ / Σ λ.", "", low=0, high=1.0001),
        Column("cumulative_share", "float64", "Shares up to this one.", "", low=0, high=1.0001),
        Column("mean_coordinate", "float64", "Mean δ along the component; null for the other targets.", "activation units",
               "effect", True, signed=True),
        Column("skewness", "float64", "Third moment of δ's coordinates over λ^1.5; null for other targets and components not read.",
               "", "effect", True, signed=True),
        Column("vector", "list<float32>", "v, of length 1; its entry of largest size is positive."),
    ),
)  # fmt: skip
TOKENS = lens_spec("pca_tokens", "Tokens that a component promotes and suppresses.", (LAYER, TARGET, COMPONENT))
EXAMPLES = examples_spec(
    "pca_examples", "Texts at both ends of a component: coordinates there, signed so that far out is large.",
    (LAYER, TARGET, COMPONENT, END), unit="activation units", role="info",
)  # fmt: skip
STEERING = steering_spec("pca_steering", (LAYER, COMPONENT, END))


@dataclass(frozen=True)
class _Fit:
    """One target at one layer; `skewness_R` of the components that are read, where they were projected on."""

    layer: int
    target: Target
    n_tokens: int
    mean_D: np.ndarray
    principal: Principal
    effective_dimension: float
    skewness_R: np.ndarray | None = None
    n_outliers: int = 0
    base_norm: float = 0.0

    @property
    def n_components(self) -> int:
        """Components of some variance."""
        return int((self.principal.variance_K > ROUNDING * self.principal.total_variance).sum())


def run(inputs: Inputs, settings: PcaSettings) -> Tables:
    """Reads the stored activations layer by layer, twice each."""
    pair, stored = inputs[Need.MODELS], inputs[Need.ACTIVATIONS]
    reading = FitReading(pair, stored, settings.min_probability)
    fits: list[_Fit] = []
    examples: list[pa.Table] = []
    layers = reading.layers(settings.layers)
    unread = {*reading.context.pick_layers(settings.shown_layers)} - {*layers} if settings.shown_layers else set()
    if unread:
        raise NotComputableError(f"shown_layers names block(s) {sorted(unread)}, but {list(layers)} are read; choose among these")
    for layer in layers:
        here = stored.at(layer)
        rows = settings.rows(here)
        n_chosen, base_norm = rows.count(), rows.base_norm()
        for fit in _fitted(rows, layer, pair.base.device, settings):
            skewness_R, shown = _ends(here, rows.selection, fit, reading, settings)
            fits.append(replace(fit, skewness_R=skewness_R, n_outliers=n_chosen - fit.n_tokens, base_norm=base_norm))
            examples += shown
    return {
        FITS.name: _fit_table(fits, reading),
        COMPONENTS.name: _component_table(fits),
        TOKENS.name: _token_table(fits, reading, settings),
        EXAMPLES.name: pa.concat_tables(examples) if examples else EXAMPLES.empty(),
        STEERING.name: _steering(fits, reading, pair, settings),
    }


def _fitted(rows: PairedActivations, layer: int, device: Any, settings: PcaSettings) -> Iterator[_Fit]:
    """The targets at one layer, all from one reading; a matrix each, which is gone when the next fit is asked for."""
    sums = {target: Covariance(rows.d_model, device) for target in settings.targets}
    for block in rows.watched(f"pca, layer {layer}"):
        for target, covariance in sums.items():
            covariance.add(getattr(block, f"{target}_ND"))
    if not sums[settings.targets[0]].count:
        raise NotComputableError(f"no stored token of layer {layer} is left to read: read more positions, roles or texts")
    for target in settings.targets:
        covariance = sums.pop(target)
        principal = covariance.principal(settings.components or rows.d_model, centred=settings.centred)
        dimension = covariance.effective_dimension(centred=settings.centred)
        yield _Fit(layer, target, covariance.count, covariance.mean_D(), principal, dimension)


def _ends(
    rows: PairedActivations, selection: Selection, fit: _Fit, reading: FitReading, settings: PcaSettings
) -> tuple[np.ndarray | None, list[pa.Table]]:
    """Skewness of the leading coordinates of the difference, and the texts at the ends where they are wanted.

    Rows that were not selected are read too, as zeros, so that a text is whole.
    """
    n_read = min(fit.n_components, settings.read_components)
    wanted = fit.target in settings.example_targets
    if not n_read or not (wanted or fit.target == "difference"):
        return None, []
    top = TopExamples(n_read * len(ENDS), settings.examples, ("max",))
    cubes_R = np.zeros(n_read)
    leading = replace(fit.principal, component_KD=fit.principal.component_KD[:n_read])
    for block in rows.watched(f"pca, layer {fit.layer}, {fit.target}: ends"):
        value_NR = leading.coordinates(getattr(block, f"{fit.target}_ND"))
        value_NR[~selection.chooses(block)] = 0
        cubes_R += (value_NR.astype(np.float64) ** 3).sum(0)
        if wanted:
            value_GN = np.concatenate([sign * value_NR.T for sign in ENDS.values()])
            top.add(reading.sequence_N(block), block.position_N, value_GN)
    skewness_R = cubes_R / fit.n_tokens / fit.principal.variance_K[:n_read] ** 1.5
    groups = {
        "layer": [fit.layer] * n_read * len(ENDS),
        "target": [fit.target] * n_read * len(ENDS),
        "component": [*range(1, n_read + 1)] * len(ENDS),
        "end": [end for end in ENDS for _ in range(n_read)],
    }
    return skewness_R if fit.target == "difference" else None, [top.table(EXAMPLES, reading.context, groups)] if wanted else []


def _fit_table(fits: list[_Fit], reading: FitReading) -> pa.Table:
    of_base = {fit.layer: fit.principal.total_variance for fit in fits if fit.target == "base"}
    return FITS.table(
        {
            "layer": [fit.layer for fit in fits],
            "target": [fit.target for fit in fits],
            "n_layers": [reading.context.n_layers] * len(fits),
            "n_tokens": [fit.n_tokens for fit in fits],
            "n_outliers": [fit.n_outliers for fit in fits],
            "total_variance": [fit.principal.total_variance for fit in fits],
            "effective_dimension": [fit.effective_dimension for fit in fits],
            "relative_variance": [
                fit.principal.total_variance / of_base[fit.layer]
                if fit.target == "difference" and of_base.get(fit.layer)
                else None
                for fit in fits
            ],
            "mean_norm": [float(np.linalg.norm(fit.mean_D)) for fit in fits],
            "mean": [fit.mean_D.astype(np.float32) for fit in fits],
        }
    )


def _component_table(fits: list[_Fit]) -> pa.Table:
    columns: dict[str, list[Any]] = {name: [] for name in COMPONENTS.schema.names}
    for fit in fits:
        n, is_difference = fit.n_components, fit.target == "difference"
        share_K = fit.principal.explained_share_K[:n]
        skewness = [] if fit.skewness_R is None else fit.skewness_R.tolist()
        columns["layer"] += [fit.layer] * n
        columns["target"] += [fit.target] * n
        columns["component"] += [*range(1, n + 1)]
        columns["variance"] += fit.principal.variance_K[:n].tolist()
        columns["explained_share"] += share_K.tolist()
        columns["cumulative_share"] += np.cumsum(share_K).tolist()
        columns["mean_coordinate"] += (fit.principal.component_KD[:n] @ fit.mean_D).tolist() if is_difference else [None] * n
        columns["skewness"] += skewness + [None] * (n - len(skewness))
        columns["vector"] += [*fit.principal.component_KD[:n].astype(np.float32)]
    return COMPONENTS.table(columns)


def _token_table(fits: list[_Fit], reading: FitReading, settings: PcaSettings) -> pa.Table:
    read = [(fit, k) for fit in fits for k in range(min(fit.n_components, settings.read_components))]
    if not read:
        return TOKENS.empty()
    vector_MD = np.stack([fit.principal.component_KD[k] for fit, k in read])
    groups = {
        "layer": [fit.layer for fit, _ in read],
        "target": [fit.target for fit, _ in read],
        "component": [k + 1 for _, k in read],
    }
    return lens_table(TOKENS, reading.lens, reading.context, vector_MD, groups, settings.top_tokens)


def _steering(fits: list[_Fit], reading: FitReading, pair: Any, settings: PcaSettings) -> pa.Table:
    layers = reading.context.pick_layers(settings.steering_layers)
    steered = [
        (fit, k, end)
        for fit in fits
        if fit.target == "difference" and fit.layer in layers
        for k in range(min(fit.n_components, settings.steered))
        for end in ENDS
    ]
    if not steered:
        return STEERING.empty()
    vector_MD = np.stack([ENDS[end] * fit.principal.component_KD[k] for fit, k, end in steered])
    groups = {
        "layer": [fit.layer for fit, *_ in steered],
        "component": [k + 1 for _, k, _ in steered],
        "end": [end for *_, end in steered],
    }
    at_M = [(fit.layer, fit.base_norm) for fit, *_ in steered]
    return steering_table(STEERING, pair, vector_MD, at_M, groups, settings)


def findings(tables: Tables, settings: PcaSettings) -> list[Finding]:
    """Of the difference's leading components: tokens of the far end, each once where it scores best, and then texts there."""
    fits = tables[FITS.name].to_pylist()
    if settings.shown_layers is None:
        layers = {max(row["layer"] for row in fits)}
    else:
        layers = {*pick_layers(settings.shown_layers, fits[0]["n_layers"])}
    leading = {
        (row["layer"], "difference", row["component"]): row
        for row in tables[COMPONENTS.name].to_pylist()
        if row["target"] == "difference" and row["layer"] in layers and row["component"] <= settings.shown_components
        and row["skewness"] is not None
    }  # fmt: skip
    return _token_findings(leading, tables, settings) + _text_findings(leading, tables, settings)


def _token_findings(leading: Mapping[Any, Mapping[str, Any]], tables: Tables, settings: PcaSettings) -> list[Finding]:
    shown = []
    for row in tables[TOKENS.name].to_pylist():
        of = leading.get((row["layer"], row["target"], row["component"]))
        if of and row["head"] == "tuned" and row["direction"] == ("promoted" if of["skewness"] >= 0 else "suppressed"):
            shown.append((of["explained_share"] * row["probability"], row))
    shown.sort(key=lambda each: (-each[0], -each[1]["layer"], each[1]["component"], each[1]["rank"]))
    best: dict[int, tuple[float, Mapping[str, Any]]] = {}
    for score, row in shown:
        best.setdefault(row["token_id"], (score, row))
    return [
        Finding(
            "token", row["token"], score, "explained share × lens probability", TOKENS.name,
            {name: row[name] for name in TOKENS.grain}, layer=row["layer"],
        )
        for score, row in [*best.values()][: settings.shown]
    ]  # fmt: skip


def _text_findings(leading: Mapping[Any, Mapping[str, Any]], tables: Tables, settings: PcaSettings) -> list[Finding]:
    shown = []
    for row in tables[EXAMPLES.name].to_pylist():
        of = leading.get((row["layer"], row["target"], row["component"]))
        if of and row["rank"] <= settings.shown_texts and row["end"] == ("positive" if of["skewness"] >= 0 else "negative"):
            shown.append((of["explained_share"], row))
    shown.sort(key=lambda each: (-each[0], -each[1]["layer"], each[1]["component"], each[1]["rank"]))
    return [
        Finding(
            "text_snippet", around_peak(row, TOKENS_BEFORE, TOKENS_AFTER), share, "explained share", EXAMPLES.name,
            {name: row[name] for name in EXAMPLES.grain}, layer=row["layer"], position=row["position"],
        )
        for share, row in shown
    ]  # fmt: skip


def headline(tables: Tables) -> dict[str, float | int | str]:
    """Where the difference is largest beside the base, and how much of it is one direction."""
    fits = [row for row in tables[FITS.name].to_pylist() if row["relative_variance"] is not None]
    if not fits:
        return {"n_fits": tables[FITS.name].num_rows}
    top = max(fits, key=lambda row: row["relative_variance"])
    first = [
        row["explained_share"]
        for row in tables[COMPONENTS.name].select(["layer", "target", "component", "explained_share"]).to_pylist()
        if (row["layer"], row["target"], row["component"]) == (top["layer"], "difference", 1)
    ]
    return {
        "relative_variance": top["relative_variance"],
        "at": f"layer {top['layer']}",
        "first_component_share": first[0] if first else 0.0,
        "effective_dimension": top["effective_dimension"],
    }


METHOD = Method(
    name="pca",
    version="3",
    kind="fit",
    needs=frozenset({Need.ACTIVATIONS, Need.MODELS}),
    settings=PcaSettings,
    tables=(FITS, COMPONENTS, TOKENS, EXAMPLES, STEERING),
    reference="Pearson 1901, https://doi.org/10.1080/14786440109462720",
    findings=findings,
    headline=headline,
    run=run,
    figures=(
        Figure("line", "Cumulative share of variance by component", COMPONENTS, "component", "cumulative_share", "target"),
        Figure("bar", "Variance of the difference beside the base's, by block", FITS, "layer", "relative_variance"),
    ),
)
