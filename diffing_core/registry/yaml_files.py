"""One YAML file to one mapping: duplicate keys, empty files and lists are refused, with the line."""

from pathlib import Path
from typing import Any

import yaml

from diffing_core.errors import RegistryError


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader keeps the last of two equal keys in silence; this one refuses them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise RegistryError(
                    f"line {line}: key {key.value!r} was already given in line {seen[key.value]}; keep one"
                )
            seen[str(key.value)] = line
        return super().construct_mapping(node, deep)


def read_mapping(file: Path) -> dict[str, Any]:
    """The file's top-level mapping.

    Raises:
        RegistryError: syntax error, duplicate key, empty file, or something else than a mapping; the file is not named.
    """
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _StrictLoader)
    except UnicodeDecodeError as error:
        raise RegistryError(f"not UTF-8 ({error}); save the file as UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise RegistryError(
            f"{where}not YAML ({problem}); quote texts that contain ': ' or begin with a symbol"
        ) from error
    if content is None:
        raise RegistryError("the file is empty; begin with name: " + file.stem)
    if not isinstance(content, dict):
        raise RegistryError(
            f"a {type(content).__name__} at top level; expected one entry as a mapping, beginning with name: {file.stem}"
        )
    return content
