"""A method's settings as a Dagster launch form: typed, with descriptions and defaults, typos refused.

The form is only a form: what was entered is validated by the method's own settings class.
"""

from typing import Any

import dagster as dg
from pydantic import ValidationError

from diffing_core.methods import get_method
from diffing_core.methods.base import Method
from diffing_core.settings import Settings

SCALARS = {bool: dg.Bool, int: dg.Int, float: dg.Float, str: dg.String}


def form(methods: list[Method]) -> dict[str, dg.Field]:
    """One optional section per method."""
    return {
        method.name: dg.Field(
            {name: _field(field) for name, field in method.settings.model_fields.items()}, is_required=False
        )
        for method in methods
        if method.settings.model_fields
    }


def settings_of(names: list[str], entered: dict[str, dict[str, Any]]) -> dict[str, Settings]:
    """Validated settings by method name.

    Raises:
        dg.Failure: a value is out of bounds; nothing was started.
    """
    settings: dict[str, Settings] = {}
    for name in names:
        given = {field: value for field, value in entered.get(name, {}).items() if value is not None}
        try:
            settings[name] = get_method(name).settings(**given)
        except ValidationError as error:
            raise dg.Failure(f"settings of {name!r} are not acceptable: {error}", allow_retries=False) from error
    return settings


def _field(field: Any) -> dg.Field:
    kind = SCALARS.get(field.annotation, dg.Noneable(dg.Any))
    return dg.Field(kind, is_required=False, description=field.description)
