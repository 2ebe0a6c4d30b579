"""Heavy libraries by name only: `from diffing_core.lazy import torch` costs nothing until it is used.

Declarations (a method's name, tables, settings) are read by the web server, the sensors and the
command line, which must not wait seconds for torch; the same file also holds the computation.
"""

import importlib
from typing import Any


class LazyModule:
    """Stands for a module and imports it at the first attribute access."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


torch: Any = LazyModule("torch")
functional: Any = LazyModule("torch.nn.functional")
pl: Any = LazyModule("polars")
