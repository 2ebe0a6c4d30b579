"""The command `diffing`: registry, demo, SQL and results from a terminal."""

import json
import logging
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from diffing_core.errors import DiffingError

WIDE = 220
app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)
organisms = typer.Typer(no_args_is_help=True, help="The registered finetunes.")
app.add_typer(organisms, name="organisms")


@organisms.command("list")
def list_organisms(model: Annotated[str | None, typer.Option(help="Only pairs of this base model.")] = None) -> None:
    """Every pair that can be compared: partition key, arm, type, and whether its weights are there."""
    from diffing_core.registry import load_registry

    registry = load_registry()
    rows = []
    for pair in registry.pairs(model):
        organism = registry.organism(pair.organism)
        state = "ready" if registry.is_available(pair) else "weights missing"
        rows.append([pair.key, organism.arm, organism.type, state, organism.description])
    _print_table(["pair", "arm", "type", "weights", "description"], rows)


@organisms.command()
def validate() -> None:
    """Reads every registry file and tells all problems at once."""
    from diffing_core.registry import load_registry

    registry = load_registry()
    typer.echo(f"{len(registry.organisms)} organisms, {len(registry.models)} models, {len(registry.pairs())} pairs: all valid")


@organisms.command()
def add(file: Path) -> None:
    """Validates an organism's YAML file and copies it into $DIFFING_HOME/registry/organisms."""
    from diffing_core.registry import add_organism

    organism = add_organism(file)
    typer.echo(f"added {organism.name}; the sensor gives it partitions within a minute, or press Materialize in the web UI")


@organisms.command()
def import_toolkit(folder: Path) -> None:
    """Converts a folder of diffing-toolkit organism and model files into registry files."""
    from diffing_core.registry import import_toolkit as convert
    from diffing_core.settings import diffing_home

    typer.echo(str(convert(folder, diffing_home() / "registry")))


@app.command()
def demo(tier: Annotated[str, typer.Option(help="tiny, demo or large.")] = "demo") -> None:
    """Trains the embedded organisms, compares, grades and reports them, all through Dagster."""
    from diffing_assets.demo import run_demo
    from diffing_core.settings import diffing_home

    succeeded = run_demo(tier)
    show_results(tier)
    typer.echo(f"report: {diffing_home() / 'site'}\n`make ui` serves it on 127.0.0.1:3001 and the web UI on 127.0.0.1:3000")
    raise typer.Exit(0 if succeeded else 1)


@app.command()
def methods() -> None:
    """The methods: what each answers, what it reads, and where it comes from."""
    from diffing_core.methods import all_methods, description_of
    from diffing_core.methods.base import Need

    rows = [
        [
            each.name,
            description_of(each).split("\n")[0],
            ", ".join(sorted(need.value for need in each.needs - {Need.FOLDER})),
            each.reference,
        ]
        for each in all_methods().values()
    ]
    _print_table(["method", "what it answers", "reads", "reference"], rows)


@app.command()
def sql(query: str) -> None:
    """Runs a query: `raw` and `marts` are the published snapshot, `live` is the lake as it is now."""
    from diffing_core.catalog import all_tables
    from diffing_core.lake import Lake
    from diffing_core.settings import diffing_home
    from diffing_core.warehouse import FILE, connect_live

    home = diffing_home()
    with connect_live(Lake(home / "lake"), all_tables().values(), home / FILE) as connection:
        result = connection.sql(query)
        if result is not None:
            result.show(max_rows=200, max_width=200)


@app.command()
def explain(
    organism: str,
    model: Annotated[str, typer.Argument()] = "demo",
    variant: Annotated[str, typer.Argument()] = "default",
    shown: Annotated[int, typer.Option(help="Findings listed per method.")] = 5,
) -> None:
    """What each method found on one pair, what was concluded, and how right that was."""
    from diffing_assets.explain import explanation

    _print_table(*explanation(organism, model, variant, shown))


@app.command()
def edit(
    specification: Annotated[str, typer.Argument(help="A YAML file, or a packaged amplification: 2x, 3x, negative_1x …")],
    out: Annotated[Path, typer.Option(help="The folder is written below it.")],
    model: Annotated[str, typer.Option(help="Registered base model.")] = "demo",
    organism: Annotated[str | None, typer.Option(help="The finetune that the specification leaves open.")] = None,
    variant: Annotated[str, typer.Option()] = "default",
) -> None:
    """Writes an edited model (amplified, negated, summed, truncated) as an ordinary PEFT or Hugging Face folder."""
    from diffing_core.registry import load_registry
    from diffing_core.weight_edits import amplified, read_specification, write_edit
    from diffing_core.weight_edits.folders import NOTE_FILE

    file = Path(specification)
    asked = amplified(specification, organism, variant) if organism and not file.is_file() else read_specification(file)
    asked = asked.on(organism, variant) if organism else asked
    folder = write_edit(asked, model, load_registry(), out)
    for each in json.loads((folder / NOTE_FILE).read_text(encoding="utf-8"))["left_out"]:
        typer.echo(f"not in it, since the base has no place for it: {each}", err=True)
    typer.echo(str(folder))


@app.command()
def ui(port: int = 3000, site_port: int = 3001) -> None:
    """Serves the Dagster web UI and the report on the loopback address until interrupted."""
    from diffing_assets.serve import serve

    serve(port, site_port)


def show_results(model: str) -> None:
    """The demo's two tables: method effectiveness, and method × organism."""
    from diffing_assets.explain import LEGEND, READING, effectiveness, method_by_organism

    _print_table(*effectiveness(model))
    typer.echo(READING)
    _print_table(*method_by_organism(model))
    typer.echo(LEGEND)


def main() -> None:
    """Entry point: errors of this project are told in one line, without a traceback."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that servers are stopped on the way out
    try:
        app()
    except DiffingError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        sys.exit(2)


def _print_table(columns: list[str], rows: list[list[object]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns)
    for row in rows:
        table.add_row(*(Text("" if value is None else str(value)) for value in row))
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDE)
    console.print(table)
