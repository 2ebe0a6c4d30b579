"""Every error this project raises on purpose.

    DiffingError
    |-- RegistryError         a YAML entry, a pair key or a name is not acceptable
    |-- ModelLoadError        weights, adapter or tokenizer are missing, damaged or do not belong together
    |-- CorpusError           probe texts are missing, empty or too short
    |-- TableError            a frame does not match its TableSpec
    |-- StorageError          the lake or the warehouse cannot be read or written as asked
    |-- UndeclaredNeedError   a method asked for something that its declaration does not name
    |-- NotComputableError    a method cannot run on this pair, or a document not be read (said before any work)
    |-- ServingError          a server of models does not answer, or not as it must
    `-- EvaluationError       an investigator or grader got something it must not use

A message names what was found, what was expected, where, and what to do.
"""


class DiffingError(Exception):
    """Root of the tree above; catching it never hides a programming error."""


class RegistryError(DiffingError):
    """A YAML entry, a pair key or a name is not acceptable."""


class ModelLoadError(DiffingError):
    """Weights, adapter or tokenizer are missing, damaged or do not belong together."""


class CorpusError(DiffingError):
    """Probe texts are missing, empty or too short."""


class TableError(DiffingError):
    """A frame does not match its TableSpec."""


class StorageError(DiffingError):
    """The lake or the warehouse cannot be read or written as asked."""


class UndeclaredNeedError(DiffingError):
    """A method asked for something that its declaration does not name."""


class NotComputableError(DiffingError):
    """A method cannot run on this pair; raised before any work is done."""


class ServingError(DiffingError):
    """A server of models does not answer, or not as it must."""


class EvaluationError(DiffingError):
    """An investigator or grader got something it must not use."""


class LibraryErrors:
    """Context of a call by which a library reads what others wrote: whatever it raises there becomes a ModelLoadError.

    Libraries raise every kind of error on files that are not as they expect, some even `Exception` itself; an error of ours
    stays as it is.
    """

    def __init__(self, what: str, to_do: str = "") -> None:
        """`what` could not be done; `to_do` follows the library's own words."""
        self._what, self._to_do = what, to_do

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, DiffingError):
            said = str(error).strip()[:600] or type(error).__name__
            raise ModelLoadError(f"{self._what}: {said}{self._to_do}") from error


# What one model, corpus or method raises when it fails; where many are worked on, the others go on.
FAILS_ALONE = (DiffingError, RuntimeError, ValueError, ArithmeticError, LookupError, OSError)
