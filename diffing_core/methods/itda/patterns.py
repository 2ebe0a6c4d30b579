"""How leading new atoms' coefficients run along the snippets that they are from."""

from typing import Any

import numpy as np

from diffing_core.activation_pairs import PairedActivations, PairedRows, joined
from diffing_core.fit_reading import FitReading
from diffing_core.itda_dictionary import unit
from diffing_core.methods.itda.layer_tables import LayerResult, Rows


def pattern_rows(result: LayerResult, at: PairedActivations, reading: FitReading) -> Rows:
    """Rows of `itda_patterns`: tokens that methods do not see have none."""
    if not len(result.leading):
        return []
    tokens = result.new.token_A[: len(result.leading)]
    rows = _rows_of(result.material.sequence_N[tokens], at, reading)
    coefficient = {side: _coefficients(result, getattr(rows, f"{side}_ND")) for side in ("base", "tuned")}
    sequence_N, around, found = reading.sequence_N(rows), result.settings.context_tokens, []
    for place, token in enumerate(tokens):
        offset_N = rows.position_N - result.material.rows.position_N[token]
        [here] = np.nonzero((sequence_N == result.material.sequence_N[token]) & (np.abs(offset_N) <= around))
        [name] = result.sources.tokens(result.material, np.asarray([token]))
        found += [
            {
                "layer": result.layer,
                "atom": int(result.leading[place]),
                "place": int(offset_N[row]),
                "label": f"layer {result.layer}, {place + 1}: {name.strip()}",
                "token": text,
                "tuned": float(coefficient["tuned"][row, place]),
                "base": float(coefficient["base"][row, place]),
            }
            for row, text in zip(here, reading.context.token_texts(rows.token_N[here].tolist()), strict=True)
        ]
    return found


def _rows_of(sequences: np.ndarray, at: PairedActivations, reading: FitReading) -> PairedRows:
    """All stored tokens of some texts."""
    parts = ((rows, np.flatnonzero(np.isin(reading.sequence_N(rows), sequences))) for rows in at.blocks())
    return joined([rows.take(kept) for rows, kept in parts if len(kept)])


def _coefficients(result: LayerResult, vector_ND: Any) -> np.ndarray:
    """Absolute coefficients of the leading new atoms, [N, A]."""
    atom_ID = result.found.staged.whole.atom_ID
    code = result.settings.encoder.encode(unit(vector_ND.float().to(atom_ID.device)), atom_ID)
    return code.columns(len(atom_ID), result.leading).abs().cpu().numpy()
