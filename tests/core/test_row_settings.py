"""Which stored rows fit methods read: one set of settings, outliers left out of both models alike, and counted."""

from pathlib import Path

import numpy as np
import pytest
import torch

from diffing_core.activation_pairs import PairedActivations, joined
from diffing_core.methods import get_method
from diffing_core.row_settings import RowSettings
from tests.core.test_activation_pairs import material


@pytest.mark.parametrize("name", ["pca", "sae_diff", "crosscoder", "itda"])
def test_all_fit_methods_choose_rows_by_the_same_settings(name: str) -> None:
    settings = get_method(name).settings
    assert issubclass(settings, RowSettings)
    own = {field: settings.model_fields[field].default for field in RowSettings.model_fields}
    assert own == {field: RowSettings.model_fields[field].default for field in RowSettings.model_fields}


def test_rows_long_in_either_model_are_left_out_of_every_part(tmp_path: Path) -> None:
    stored = material(tmp_path, 60)
    rows = joined(list(stored.blocks()))
    norms_MN = torch.stack([each.float().norm(dim=1) for each in (rows.base_ND, rows.tuned_ND)]).numpy()
    usual_M = np.median(norms_MN, axis=1)
    ratio = float(np.quantile((norms_MN / usual_M[:, None]).max(0), 0.8))
    stored_without = stored.without(stored.outliers(ratio))
    expected_N = (norms_MN <= ratio * usual_M[:, None]).all(0)
    kept = joined(list(stored_without.blocks()))
    assert 0 < len(kept) == expected_N.sum() < len(rows) == stored_without.count()
    np.testing.assert_array_equal(kept.token_N, rows.token_N[expected_N])
    shuffled = joined(list(stored_without.shuffled(7, seed=1)))
    assert sorted(shuffled.token_N.tolist()) == sorted(kept.token_N.tolist())


def test_what_is_usual_is_measured_on_the_rows_to_fit_on(tmp_path: Path) -> None:
    settings = RowSettings(first_position=0, outlier_ratio=1.05)
    stored: PairedActivations = material(tmp_path, 60)
    chosen = settings.rows(stored, 0.3)
    fit = joined(list(stored.of(settings.selection("fit", 0.3)).blocks()))
    base = 1.05 * float(np.median(fit.base_ND.float().norm(dim=1).numpy()))
    assert chosen.selection.outliers is not None
    assert chosen.selection.outliers.most_M[0] == pytest.approx(base)
    assert chosen.selection.part == "all" and chosen.selection.held_out_share == 0.3
