"""SQL functions of the dbt session: statistics that SQL lacks, from the one module that holds them.

Marts are tables, so that whoever reads them needs none of these functions. Arguments that are null give null.

    clopper_pearson(k, n)           struct of low and high
    wilson(k, n)                    the same; k may be a sum of values from 0 to 1
    cluster_mean(clusters, values)  the same, of the mean of values; rows of one cluster depend on each other
    mcnemar_exact(only_a, only_b)   p-value
    holm(p_values)                  adjusted p-values in the order given
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import duckdb
import numpy as np
from dbt.adapters.duckdb.plugins import BasePlugin

from diffing_core import stats

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

INTERVAL = duckdb.struct_type({"low": "DOUBLE", "high": "DOUBLE"})
N_RESAMPLES = 2_000


class Plugin(BasePlugin):
    """What dbt-duckdb loads, as named in `profiles.yml`."""

    def configure_connection(self, conn: "DuckDBPyConnection") -> None:
        """Gives a new session the functions."""
        add_functions(conn)


def add_functions(connection: "DuckDBPyConnection") -> None:
    """Registers every function of this module's docstring."""
    connection.create_function("clopper_pearson", stats.clopper_pearson, ["BIGINT", "BIGINT"], INTERVAL)
    connection.create_function("wilson", stats.wilson, ["DOUBLE", "BIGINT"], INTERVAL)
    connection.create_function("cluster_mean", _cluster_mean, ["VARCHAR[]", "DOUBLE[]"], INTERVAL)
    connection.create_function("mcnemar_exact", stats.mcnemar_exact, ["BIGINT", "BIGINT"], "DOUBLE")
    connection.create_function("holm", stats.holm, ["DOUBLE[]"], "DOUBLE[]")


def _cluster_mean(clusters: Sequence[str], values: Sequence[float]) -> stats.Interval:
    return stats.cluster_bootstrap(values, clusters, np.mean, seed=0, n_resamples=N_RESAMPLES)
