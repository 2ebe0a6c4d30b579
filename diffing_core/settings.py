"""Settings: the knobs of a method, and the identity that they give to its results."""

import hashlib
import json
import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Base of every settings class: frozen, unknown keys refused, defaults live here and only here."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def settings_id(self) -> str:
        """Eight hex digits over the canonical JSON: equal settings, equal id."""
        return short_hash(self.model_dump(mode="json"), 8)


def short_hash(value: object, digits: int = 12) -> str:
    """Hex digest of a JSON-able value, independent of dictionary order and of the process."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def diffing_home() -> Path:
    """The one folder that holds all state: `DIFFING_HOME`, by default `./var`."""
    return Path(os.environ.get("DIFFING_HOME", "var")).resolve()
