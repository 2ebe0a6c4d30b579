"""Resources: where the state is, as one object that builds the core's own."""

from pathlib import Path

import dagster as dg

from diffing_core.catalog import all_tables
from diffing_core.lake import Lake
from diffing_core.registry import Registry, load_registry
from diffing_core.settings import diffing_home
from diffing_core.warehouse import FILE


class Workspace(dg.ConfigurableResource):
    """The folder `DIFFING_HOME` and what lies in it."""

    @property
    def home(self) -> Path:
        """All state."""
        return diffing_home()

    @property
    def store(self) -> Path:
        """Activation Parquet."""
        return self.home / "activations"

    @property
    def warehouse(self) -> Path:
        """The published DuckDB file."""
        return self.home / FILE

    def registry(self) -> Registry:
        """The registry as it is now: a file dropped in a minute ago counts."""
        return load_registry()

    def lake(self) -> Lake:
        """The lake, every table present."""
        lake = Lake(self.home / "lake")
        lake.seed(all_tables().values())
        return lake
