"""`diffing methods` tells every method in a line of its own words."""

from typer.testing import CliRunner

from diffing_assets.cli import app
from diffing_core.methods import all_methods, description_of


def test_every_method_is_told_with_what_it_answers() -> None:
    told = " ".join(CliRunner().invoke(app, ["methods"], env={"COLUMNS": "400"}, catch_exceptions=False).output.split())
    for method in all_methods().values():
        first_line = description_of(method).split("\n")[0]
        assert method.name in told
        assert first_line.split()[0] in told
        assert first_line.endswith(("." , "?")), method.name
