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
        self._module: Any = None

    def __getattr__(self, attribute: str) -> Any:
        if self._module is None:  # folds ask hundreds of times per block; the import system takes microseconds each time
            self._module = importlib.import_module(self._name)
        return getattr(self._module, attribute)


torch: Any = LazyModule("torch")
functional: Any = LazyModule("torch.nn.functional")
pl: Any = LazyModule("polars")
