"""Reporting a run over several pairs: each partition with its own metadata, and failures that stay alone.

A run over a range of partitions yields one result per asset, which counts for all of them. Where a pair
fails, the others are therefore logged one by one, and the run ends with one Failure that names each cause.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import dagster as dg

from diffing_core.errors import FAILS_ALONE
from diffing_core.pairs import Pair


class PairReport:
    """What became of one asset on the pairs of a run."""

    def __init__(self, context: dg.AssetExecutionContext, key: dg.AssetKey) -> None:
        self.key = key
        self.errors: list[str] = []
        self._context = context
        self._done: dict[Pair, dict[str, Any]] = {}

    @contextmanager
    def of(self, pair: Pair) -> Iterator[dict[str, Any]]:
        """Gives a dictionary for the pair's metadata; a failure inside is noted, and the next pair goes on."""
        shown: dict[str, Any] = {}
        try:
            yield shown
        except FAILS_ALONE as error:
            self._context.log.exception("%s on %s", self.key.to_user_string(), pair)
            self.failed(pair, error)
            return
        self.done(pair, shown)

    def done(self, pair: Pair, shown: dict[str, Any]) -> None:
        """Notes a finished pair with what a person should see."""
        self._done[pair] = {name: value for name, value in shown.items() if value is not None}

    def failed(self, pair: Pair, error: Exception) -> None:
        """Notes a pair that failed alone."""
        self.errors.append(f"{pair} / {self.key.path[-1]}: {type(error).__name__}: {error}")

    def result(self) -> dg.MaterializeResult | None:
        """One result if all pairs succeeded; otherwise the finished ones are logged apart."""
        if self.errors:
            for pair, shown in self._done.items():
                event = dg.AssetMaterialization(asset_key=self.key, partition=pair.key, metadata=shown)
                self._context.log_event(event)
            return None
        if len(self._done) == 1:
            return dg.MaterializeResult(asset_key=self.key, metadata=next(iter(self._done.values())))
        for pair, shown in self._done.items():
            self._context.add_asset_metadata(shown, asset_key=self.key, partition_key=pair.key)
        return dg.MaterializeResult(asset_key=self.key)

    def results(self) -> Iterator[dg.MaterializeResult]:
        """The result of an asset that is alone in its step."""
        return results_of([self])


def results_of(reports: Sequence[PairReport]) -> Iterator[dg.MaterializeResult]:
    """Results of all assets without failures, then one Failure if there were any."""
    yield from filter(None, [report.result() for report in reports])
    errors = [line for report in reports for line in report.errors]
    if errors:
        raise dg.Failure(
            f"{len(errors)} result(s) failed; all others are stored. First: {errors[0]}",
            metadata={"failures": dg.MetadataValue.md("\n".join(f"* {line}" for line in errors))},
            allow_retries=False,
        )
