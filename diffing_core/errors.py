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


# What one model, corpus or method raises when it fails; where many are worked on, the others go on.
FAILS_ALONE = (DiffingError, RuntimeError, ValueError, ArithmeticError, LookupError, OSError)
