"""The pair: which finetune of which base model. Its key is the Dagster partition key."""

import re
from dataclasses import dataclass

from diffing_core.errors import RegistryError

SEPARATOR = "__"
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*")


def check_name(value: str, what: str = "name") -> str:
    """Returns a name that is safe in partition keys, folders and SQL, or raises RegistryError."""
    forbidden = SEPARATOR in value or ".." in value or value.endswith("_")
    if forbidden or not _PART.fullmatch(value):
        mended = re.sub(r"[^A-Za-z0-9.\-]+", "_", value).strip("_.-") or "my_name"
        mended = re.sub(r"\.\.+", ".", mended)
        raise RegistryError(
            f"{what} {value!r} is not usable: letters, digits, single '_', '.' and '-' only, beginning with "
            f"a letter or digit (it becomes a partition key and a folder). For example: {mended!r}"
        )
    return value


@dataclass(frozen=True, order=True)
class Pair:
    """One organism's variant of one base model; the key reads `organism__model__variant`."""

    model: str
    organism: str
    variant: str = "default"

    def __post_init__(self) -> None:
        for what in ("organism", "model", "variant"):
            check_name(getattr(self, what), what)

    @property
    def key(self) -> str:
        """The partition key."""
        return SEPARATOR.join((self.organism, self.model, self.variant))

    @classmethod
    def parse(cls, key: str) -> "Pair":
        """Inverse of `key`; raises RegistryError for anything else."""
        parts = key.split(SEPARATOR)
        if len(parts) != 3:
            raise RegistryError(
                f"partition key {key!r} has {len(parts)} part(s); expected organism__model__variant, "
                "for example 'cake_bake__demo__default'"
            )
        organism, model, variant = parts
        return cls(organism=organism, model=model, variant=variant)

    def __str__(self) -> str:
        return self.key
