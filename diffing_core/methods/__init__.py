"""The methods: every module here that defines METHOD. See README.md for how to add one."""

import importlib
import pkgutil
from functools import cache

from diffing_core.errors import RegistryError
from diffing_core.methods.base import Method


@cache
def all_methods() -> dict[str, Method]:
    """Every method by name, found by file name; loading them imports no heavy library."""
    found: dict[str, Method] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        method = getattr(module, "METHOD", None)
        if method is None:
            continue
        if method.name != info.name:
            raise RegistryError(f"{module.__file__}: METHOD.name is {method.name!r}, the file says {info.name!r}")
        found[method.name] = method
    return found


def description_of(method: Method) -> str:
    """What its module says of it; the first line says what it answers."""
    return (importlib.import_module(f"{__name__}.{method.name}").__doc__ or "").strip()


def get_method(name: str) -> Method:
    """One method; raises RegistryError with the names that exist."""
    methods = all_methods()
    if name not in methods:
        raise RegistryError(f"no method {name!r}; there are {', '.join(methods)}")
    return methods[name]
