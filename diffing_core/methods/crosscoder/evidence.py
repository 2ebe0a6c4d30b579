"""What a person is shown of the tables: tokens that the listed latents promote, and texts in which they are active."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from diffing_core.band_examples import BANDS
from diffing_core.examples import around_peak
from diffing_core.findings import Finding
from diffing_core.methods.base import Tables
from diffing_core.methods.crosscoder.schema import EXAMPLES, LATENTS, TOKENS
from diffing_core.methods.crosscoder.settings import CrosscoderSettings

TOKEN_UNIT = "lens probability × activation units"
SNIPPET_TOKENS = 16  # each way


def findings(tables: Tables, settings: CrosscoderSettings) -> list[Finding]:
    """Tokens that the listed latents promote, by probability × contribution to δ summed over latents; then their texts."""
    size = {(row["layer"], row["latent"]): row["difference_rms"] for row in _listed(tables[LATENTS.name], tables[TOKENS.name])}
    total: Counter[str] = Counter()
    best: dict[str, tuple[float, dict[str, Any]]] = {}
    for row in tables[TOKENS.name].to_pylist():
        if row["head"] == "tuned" and row["direction"] == "promoted":
            share = row["probability"] * size[row["layer"], row["latent"]]
            total[row["token"]] += share
            best[row["token"]] = max(best.get(row["token"], (-1.0, row)), (share, row), key=lambda pair: pair[0])
    tokens = [
        Finding("token", token, score, TOKEN_UNIT, TOKENS.name, {name: best[token][1][name] for name in TOKENS.grain},
                layer=best[token][1]["layer"])
        for token, score in sorted(total.items(), key=lambda pair: (-pair[1], pair[0]))[: settings.shown]
    ]  # fmt: skip
    return tokens + _texts(tables[EXAMPLES.name], size, settings.shown_texts)


def _listed(latents: pa.Table, tokens: pa.Table) -> list[dict[str, Any]]:
    named = set(zip(tokens["layer"].to_pylist(), tokens["latent"].to_pylist(), strict=True))
    return [row for row in latents.to_pylist() if (row["layer"], row["latent"]) in named]


def _texts(examples: pa.Table, size: Mapping[tuple[int, int], float], most: int) -> list[Finding]:
    """Around the strongest activation of the latents that contribute most."""
    rows = [row for row in examples.to_pylist() if row["band"] == BANDS[-1] and row["rank"] == 1]
    rows.sort(key=lambda row: -size[row["layer"], row["latent"]])
    found = []
    for row in rows[:most]:
        text = around_peak(row, SNIPPET_TOKENS, SNIPPET_TOKENS - 1)
        key = {name: row[name] for name in EXAMPLES.grain}
        found.append(
            Finding("text_snippet", text, size[row["layer"], row["latent"]], "activation units", EXAMPLES.name, key,
                    layer=row["layer"], position=row["position"])
        )  # fmt: skip
    return found
