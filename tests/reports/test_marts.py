"""The marts, worked out by hand from the outcomes of the synthetic lake."""

import re
from dataclasses import replace
from pathlib import Path

import duckdb
import jinja2
import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import beta

from dbt_reports import functions
from dbt_reports.generate_sources import FIGURES, SOURCES, dbt_sources, figure_points
from diffing_assets.keys import table_sources
from diffing_core import stats
from diffing_core.agents.calibration import prediction_bound
from diffing_core.catalog import all_tables
from diffing_core.methods import all_methods
from diffing_core.methods.base import Method
from diffing_core.pairs import Pair
from diffing_core.tables import Column, TableSpec
from tests.reports import synthetic
from tests.reports.conftest import PROJECT

Marts = duckdb.DuckDBPyConnection


def rows(marts: Marts, sql: str) -> list[dict]:
    return marts.sql(sql).to_arrow_table().to_pylist()


def exact(k: int, n: int) -> tuple[float, float]:
    low = float(beta.ppf(0.025, k, n - k + 1)) if k else 0.0
    high = float(beta.ppf(0.975, k + 1, n - k)) if k < n else 1.0
    return low, high


def outcomes_of(method: str) -> tuple[list[str], list[str], list[str]]:
    """Outcomes of the organisms by their default variant, of every variant, and of the nulls that may raise an alarm."""
    place = synthetic.METHODS.index(method)
    organisms, variants, nulls = [], [], []
    for key, outcomes in synthetic.OUTCOMES.items():
        pair, outcome = Pair.parse(key), outcomes[place]
        if pair.organism not in synthetic.NULL_ARMS:
            variants.append(outcome)
            organisms += [outcome] if pair.variant == "default" else []
        elif synthetic.NULL_ARMS[pair.organism] != "identical":
            nulls.append(outcome)
    return organisms, variants, nulls


@pytest.mark.parametrize("method", synthetic.METHODS)
def test_rates_and_intervals_are_those_of_the_outcomes(marts: Marts, method: str) -> None:
    organisms, variants, nulls = outcomes_of(method)
    [row] = rows(marts, f"from method_effectiveness where method = '{method}'")
    ranked_first = sum(outcome in "CR" for outcome in organisms)
    assert (row["n_organisms"], row["n_ranked"], row["n_variants"], row["n_nulls"]) == (5, 5, 6, 4)
    assert row["n_asserted"] == sum(outcome in "CW" for outcome in organisms)
    assert row["n_top1"] == ranked_first
    reciprocal_ranks = ranked_first + 0.25 * (5 - ranked_first)
    assert row["mrr"] == pytest.approx(reciprocal_ranks / 5)
    assert (row["mrr_low"], row["mrr_high"]) == pytest.approx(stats.wilson(reciprocal_ranks, 5))
    for name, hits, n in (
        ("detection", organisms.count("C"), 5),
        ("top1", ranked_first, 5),
        ("false_positive", nulls.count("A"), 4),
    ):
        low, high = exact(hits, n)
        assert row[f"{name}_rate"] == pytest.approx(hits / n)
        assert (row[f"{name}_low"], row[f"{name}_high"]) == pytest.approx((low, high), abs=1e-9)
    assert row["n_variants_detected"] == variants.count("C")
    assert row["variant_detection_low"] <= row["variant_detection_rate"] <= row["variant_detection_high"]
    grades = [{"C": 4, "W": 1}[outcome] for outcome in organisms if outcome in "CW"]
    assert row["n_scored"] == len(grades)
    assert row["n_unscored"] == 0, "silence and nulls have nothing to score"
    assert row["mean_score"] == (pytest.approx(sum(grades) / len(grades)) if grades else None)


def test_identical_models_are_no_trial_and_raise_no_alarm(marts: Marts) -> None:
    """They cannot raise one: counted among the nulls, they would only make the false-alarm rate look better known."""
    assert rows(marts, "select distinct arm from outcomes where is_null_arm and not is_trial") == [{"arm": "identical"}]
    assert rows(marts, "select sum(n_identical_alarms) as n from method_effectiveness") == [{"n": 0}]


def test_variant_intervals_draw_whole_organisms(marts: Marts) -> None:
    """Both variants of cake_bake succeed or fail together; drawn alone they would narrow the interval."""
    [row] = rows(marts, "from method_effectiveness where method = 'kl'")
    clusters = ["cake_bake", "cake_bake", "fda_approval", "owl_love", "roman_concrete", "taboo_leaf"]
    expected = stats.cluster_bootstrap([1, 1, 1, 0, 0, 0], clusters, np.mean, seed=0)
    found = row["variant_detection_low"], row["variant_detection_high"]
    assert found == pytest.approx(expected, abs=0.1), "another number of draws"


def test_methods_are_compared_with_blackbox_organism_by_organism(marts: Marts) -> None:
    baseline = outcomes_of("blackbox")[0]
    found = rows(marts, "from against_blackbox order by method")
    assert [row["method"] for row in found] == sorted(set(synthetic.METHODS) - {"blackbox"})
    for row in found:
        outcomes = list(zip(outcomes_of(row["method"])[0], baseline, strict=True))
        only_method = sum(a == "C" != b for a, b in outcomes)
        only_blackbox = sum(b == "C" != a for a, b in outcomes)
        assert (row["n_organisms"], row["n_only_method"], row["n_only_blackbox"]) == (5, only_method, only_blackbox)
        assert row["n_both"] + row["n_neither"] + only_method + only_blackbox == 5
        assert row["p_value"] == pytest.approx(stats.mcnemar_exact(only_method, only_blackbox))
    assert [row["p_holm"] for row in found] == pytest.approx(stats.holm([row["p_value"] for row in found]))


def test_functions_are_null_where_there_is_nothing_to_count() -> None:
    with duckdb.connect() as connection:
        functions.add_functions(connection)
        sql = "select clopper_pearson(0, null), wilson(null, 3), cluster_mean(null, null), holm(null), mcnemar_exact(0, 0)"
        assert connection.execute(sql).fetchone() == (None, None, None, None, 1.0)
        found = connection.execute("select k, clopper_pearson(k, 20) from (select unnest(range(21)) as k)").fetchall()
    assert len(found) == 21
    assert all((interval["low"], interval["high"]) == pytest.approx(exact(k, 20)) for k, interval in found)


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
        {"step": "diff", "n": 5},
        {"step": "expression", "n": 1},
        {"step": "grades", "n": 6},
        {"step": "hypotheses", "n": 6},
    ]
    assert rows(marts, "select distinct organism from freshness where is_missing") == [
        {"organism": "antarctic_rebound"}
    ]


def test_a_pair_says_what_identified_it_and_whether_it_shows(marts: Marts) -> None:
    [cake] = rows(marts, "from organism_summary where label = 'cake_bake'")
    assert (cake["n_methods"], cake["n_methods_identifying"], cake["identified_by"]) == (
        6,
        4,
        "all, blackbox, diff_mining, kl",
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


def test_figure_points_are_in_sync_with_the_methods() -> None:
    """If this fails: python -m dbt_reports.generate_sources."""
    assert FIGURES.read_text() == figure_points(all_methods().values())


@pytest.mark.parametrize("method", [each for each in all_methods().values() if each.figures], ids=lambda each: each.name)
def test_the_page_draws_the_points_of_the_picture(method: Method) -> None:
    """The generated SQL and `Figure.series` agree on rows that share places, hold nulls, or cannot be on a log axis."""
    for number, figure in enumerate(method.figures):
        table = random_rows(figure.table)
        with duckdb.connect() as connection:
            connection.register("rows", table.append_column("run_id", [["r"] * len(table)]))
            keys = ", ".join(f"'{name}' as {name}" for name in ("organism", "model", "variant", "corpus"))
            sql = figure_points([replace(method, figures=(figure,))]).partition("\n")[2]
            source = f"(select *, {keys}, '{method.name}' as method from rows)"
            sql = re.sub(r"\{\{ source\('raw', '\w+'\) \}\}", source, sql)
            found = {(series, x): value for series, x, value in connection.execute(f"select series, x, value from ({sql})").fetchall()}
        drawn = replace(figure, most=10**6).series({figure.table.name: table})
        assert found == {(name, str(x)): value for name, cells in drawn.items() for x, value in cells.items()}, number
        assert found


def random_rows(spec: TableSpec) -> pa.Table:
    """Rows of a table with few distinct values, zeros, and nulls where they are allowed; the grain is not kept."""
    draw = np.random.default_rng(0)

    def values(column: Column) -> list:
        numbers = draw.integers(0, 4, 40).tolist()
        made = [f"n{number}" for number in numbers] if column.dtype == "string" else numbers
        return [None if column.nullable and draw.random() < 0.2 else value for value in made]

    lists = [column for column in spec.columns if column.dtype.startswith("list") or column.dtype == "bool"]
    return pa.table({column.name: pa.array(values(column), column.arrow.type) for column in spec.columns if column not in lists})


def test_site_queries_select_and_leave_the_rest_to_dbt() -> None:
    for query in Path(PROJECT / "evidence" / "sources" / "diffing").glob("*.sql"):
        assert len(query.read_text().splitlines()) <= 15, query.name
