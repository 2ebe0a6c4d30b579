"""What is wrong with an entry, as a person wants to read it: field, what was found, what to write."""

import difflib
from collections.abc import Iterable
from typing import get_args

from pydantic import BaseModel, ValidationError

_SHOWN = 60


def close_to(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` or the names that exist."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=2)
    if close:
        return f"; did you mean {' or '.join(map(repr, close))}?"
    return f"; there are {', '.join(known[:20]) + (', …' if len(known) > 20 else '')}" if known else "; there are none"


def describe(error: ValidationError, schema: type[BaseModel]) -> list[str]:
    """One line per finding of pydantic: where, what is expected, what was found, and a close match."""
    lines = []
    for finding in error.errors(include_url=False):
        where = ".".join(map(str, finding["loc"])) or "entry"
        if finding["type"] == "extra_forbidden":
            lines.append(f"{where}: unknown key{close_to(str(finding['loc'][-1]), _fields_at(schema, finding['loc']))}")
        elif finding["type"] == "missing":
            lines.append(f"{where}: missing; add a line like {finding['loc'][-1]}: …")
        elif finding["type"] == "value_error":
            lines.append(f"{where}: {finding['ctx']['error']}")
        else:
            lines.append(f"{where}: {finding['msg']}, found {_short(finding['input'])}")
    return lines


def _fields_at(schema: type[BaseModel], path: tuple[int | str, ...]) -> Iterable[str]:
    """Names of the fields that the mapping at this place may have."""
    for step in path[:-1]:
        field = schema.model_fields.get(str(step))
        schema = (field and _model_in(field.annotation)) or schema
    return schema.model_fields


def _model_in(annotation: object) -> type[BaseModel] | None:
    """The entry class inside an annotation such as `dict[str, Variant] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
