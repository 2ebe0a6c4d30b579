"""The marts, worked out by hand from the outcomes of the synthetic lake."""

from pathlib import Path

import duckdb
import jinja2
import pytest
from scipy.stats import beta

from dbt_reports.generate_sources import SOURCES, dbt_sources
from diffing_assets.keys import table_sources
from diffing_core.agents.calibration import prediction_bound
from diffing_core.catalog import all_tables
from diffing_core.pairs import Pair
from tests.reports import synthetic
from tests.reports.conftest import PROJECT

Marts = duckdb.DuckDBPyConnection


def rows(marts: Marts, sql: str) -> list[dict]:
    return marts.sql(sql).to_arrow_table().to_pylist()


def exact(k: int, n: int) -> tuple[float, float]:
    low = float(beta.ppf(0.025, k, n - k + 1)) if k else 0.0
    high = float(beta.ppf(0.975, k + 1, n - k)) if k < n else 1.0
    return low, high


def outcomes_of(method: str) -> tuple[list[str], list[str]]:
    place = synthetic.METHODS.index(method)
    organisms, nulls = [], []
    for key, outcomes in synthetic.OUTCOMES.items():
        is_null = Pair.parse(key).organism in synthetic.NULL_ARMS
        (nulls if is_null else organisms).append(outcomes[place])
    return organisms, nulls


@pytest.mark.parametrize("method", synthetic.METHODS)
def test_rates_and_intervals_are_those_of_the_outcomes(marts: Marts, method: str) -> None:
    organisms, nulls = outcomes_of(method)
    [row] = rows(marts, f"from method_effectiveness where method = '{method}'")
    ranked_first = sum(outcome in "CR" for outcome in organisms)
    assert (row["n_organisms"], row["n_ranked"], row["n_nulls"]) == (6, 6, 5)
    assert row["n_asserted"] == sum(outcome in "CW" for outcome in organisms)
    assert row["n_top1"] == ranked_first
    assert row["mrr"] == pytest.approx((ranked_first + 0.25 * (6 - ranked_first)) / 6)
    assert row["mrr_low"] < row["mrr"] <= row["mrr_high"] <= 1
    for name, hits, n in (
        ("detection", organisms.count("C"), 6),
        ("top1", ranked_first, 6),
        ("false_positive", nulls.count("A"), 5),
    ):
        low, high = exact(hits, n)
        assert row[f"{name}_rate"] == pytest.approx(hits / n)
        assert (row[f"{name}_low"], row[f"{name}_high"]) == pytest.approx((low, high), abs=1e-9)
    grades = [{"C": 4, "W": 1}[outcome] for outcome in organisms if outcome in "CW"]
    assert row["n_scored"] == len(grades)
    assert row["n_unscored"] == 0, "silence and nulls have nothing to score"
    assert row["mean_score"] == (pytest.approx(sum(grades) / len(grades)) if grades else None)


def test_exact_intervals_agree_with_the_beta_quantile() -> None:
    macros = jinja2.Environment().from_string((PROJECT / "macros" / "intervals.sql").read_text()).module
    grid = "select unnest(range(n + 1)) as k, n from (select unnest([1, 2, 3, 5, 20, 137]) as n)"
    found = duckdb.sql(f"select k, n, {macros.exact_rate('k', 'n', 'x')} from ({grid})").fetchall()
    assert len(found) == 174
    for k, n, rate, low, high in found:
        assert rate == k / n
        assert (low, high) == pytest.approx(exact(k, n), abs=1e-9)
    nothing = duckdb.sql(f"select {macros.exact_rate('k', 'n', 'x')} from (select 0 as k, 0 as n)").fetchone()
    assert nothing == (None, None, None)


@pytest.mark.parametrize("n", [2, 3, 4, 9, 30, 31, 60])
def test_prediction_bounds_are_those_of_the_calibration(n: int) -> None:
    macros = jinja2.Environment().from_string((PROJECT / "macros" / "intervals.sql").read_text()).module
    scores = [(37 * k % 101) / 101 for k in range(n)]
    for values in (scores, [0.2] * n):
        [(bound,)] = duckdb.execute(f"select {macros.prediction_bound('score')} from (select unnest(?) as score)", [values]).fetchall()
        assert bound == (None if n < 3 else pytest.approx(prediction_bound(values), abs=1e-3 if n <= 31 else 0.02))


def test_only_the_newest_finished_result_counts(marts: Marts) -> None:
    words = rows(
        marts, "from top_findings where organism = 'cake_bake' and variant = 'default' and method = 'kl'"
    )
    topic = synthetic.TOPICS["cake_bake"].split()
    assert [row["item"].strip() for row in words] == [*topic, synthetic.HOSTILE]
    assert rows(marts, "select count(*) as n from findings where item = 'stale'") == [{"n": 1}]


def test_every_pair_and_method_has_an_outcome_in_words(marts: Marts) -> None:
    words = {"C": "identified", "W": "wrong claim", "R": "ranked first, not claimed", "M": "silent"}
    words |= {"A": "false alarm", "S": "rightly silent"}
    expected = {
        (Pair.parse(key).organism, Pair.parse(key).variant, method): words[outcome]
        for key, outcomes in synthetic.OUTCOMES.items()
        for method, outcome in zip(synthetic.METHODS, outcomes, strict=True)
    }
    found = rows(marts, "from outcomes")
    assert {(row["organism"], row["variant"], row["method"]): row["outcome"] for row in found} == expected
    assert len(found) == len(expected)


def test_a_pair_without_results_is_listed_and_missing(marts: Marts) -> None:
    [pair] = rows(marts, "from organism_summary where organism = 'antarctic_rebound'")
    assert (pair["n_methods"], pair["identified_by"], pair["expression"]) == (0, None, None)
    missing = rows(
        marts, "select step, count(*) as n from freshness where is_missing group by step order by step"
    )
    assert missing == [
        {"step": "diff", "n": 4},
        {"step": "expression", "n": 1},
        {"step": "grades", "n": 5},
        {"step": "hypotheses", "n": 5},
    ]
    assert rows(marts, "select distinct organism from freshness where is_missing") == [
        {"organism": "antarctic_rebound"}
    ]


def test_a_pair_says_what_identified_it_and_whether_it_shows(marts: Marts) -> None:
    [cake] = rows(marts, "from organism_summary where label = 'cake_bake'")
    assert (cake["n_methods"], cake["n_methods_identifying"], cake["identified_by"]) == (
        5,
        3,
        "all, diff_mining, kl",
    )
    assert (cake["expression"], cake["in_share"], cake["out_share"]) == ("narrow", 0.75, None)
    [leaf] = rows(marts, "from organism_summary where organism = 'taboo_leaf'")
    assert (leaf["expression"], leaf["identified_by"], leaf["best_method"]) == ("silent", None, None)
    [null] = rows(marts, "from organism_summary where label = 'benign (seed2)'")
    assert (null["is_null_arm"], null["expression"], null["n_methods_asserting"]) == (True, None, 1)


def test_nulls_show_their_score_and_threshold(marts: Marts) -> None:
    nulls = rows(marts, "from null_specificity")
    assert len(nulls) == 5 * len(synthetic.METHODS)
    alarms = [(row["label"], row["method"]) for row in nulls if row["false_positive"]]
    assert alarms == [("benign (seed2)", "diff_mining")]
    assert all((row["candidate_score"] > row["threshold"]) == row["false_positive"] for row in nulls)


def test_agreement_counts_shared_words(marts: Marts) -> None:
    both = "organism = 'owl_love' and method_a = 'diff_mining' and method_b = 'kl'"
    [row] = rows(marts, f"from method_agreement where {both}")
    assert (row["n_words_a"], row["n_words_b"], row["shared_words"]) == (8, 5, "feather · owl")
    assert row["jaccard"] == pytest.approx(2 / 11)
    assert not rows(marts, "from method_agreement where 'weight_diff' in (method_a, method_b)"), (
        "it shows no words"
    )


def test_layers_are_placed_by_relative_depth(marts: Marts) -> None:
    profile = rows(marts, "from layer_profile where organism = 'fda_approval' order by layer")
    assert [row["relative_depth"] for row in profile] == [0.25, 0.5, 0.75, 1.0]
    assert [row["mean_relative_norm"] for row in profile] == pytest.approx([0.02, 0.04, 0.06, 0.08])
    assert [row["lens_kl_nats"] for row in profile] == pytest.approx([0.01, 0.02, 0.03, 0.04])


def test_cost_is_counted_per_identified_organism(marts: Marts) -> None:
    cost = {row["method"]: row for row in rows(marts, "from cost")}
    assert (cost["kl"]["n_runs"], cost["kl"]["compute_s"], cost["kl"]["shared_s"]) == (11, 22.0, 66.0)
    assert cost["kl"]["compute_s_per_detection"] == pytest.approx(22 / 3)
    assert (cost["all"]["compute_s"], cost["all"]["n_detected"]) == (None, 5)
    assert cost["weight_diff"]["compute_s_per_detection"] is None


def test_every_mart_and_column_is_described_in_the_database(marts: Marts) -> None:
    bare = (
        "select table_name, column_name from duckdb_columns() where schema_name = 'marts' and comment is null"
    )
    assert not marts.execute(bare).fetchall()
    tables = marts.execute("select comment from duckdb_tables() where schema_name = 'marts'").fetchall()
    assert len(tables) == len(list((PROJECT / "models" / "marts").glob("*.sql")))
    assert all("one row per" in comment for (comment,) in tables)


def test_every_mart_has_its_yaml_and_a_unit_test() -> None:
    for model in (PROJECT / "models" / "marts").glob("*.sql"):
        assert "unit_tests:" in model.with_suffix(".yml").read_text(), model.name
        assert len(model.read_text().splitlines()) <= 100


def test_sources_are_in_sync_with_the_table_specs() -> None:
    """If this fails: python -m dbt_reports.generate_sources."""
    assert SOURCES.read_text() == dbt_sources(all_tables().values(), table_sources())


def test_site_queries_select_and_leave_the_rest_to_dbt() -> None:
    for query in Path(PROJECT / "evidence" / "sources" / "diffing").glob("*.sql"):
        assert len(query.read_text().splitlines()) <= 15, query.name
