"""Errors meant for people: one line that names the file and what to do, with an exit code."""

from __future__ import annotations

EXIT_OK = 0
EXIT_BUG = 1
EXIT_USAGE = 2
EXIT_INPUT = 3
EXIT_QUALITY = 4
EXIT_SPEED = 5
EXIT_RESOURCE = 6
EXIT_NOISY = 7


class SvdexportError(Exception):
    """Base of every error that the command line prints as one line instead of a traceback."""

    exit_code = EXIT_BUG


class RecipeError(SvdexportError):
    """A wrong recipe, option or output place, or a budget that the model cannot meet."""

    exit_code = EXIT_USAGE


class InputError(SvdexportError):
    """A model, text or artifact that is broken, hostile or not supported."""

    exit_code = EXIT_INPUT


class ArtifactError(SvdexportError):
    """A file we wrote does not hold what it should: round trip or parity failed."""

    exit_code = EXIT_INPUT


class ResourceError(SvdexportError):
    """Memory or disk ran out; what was finished is kept and a second run resumes."""

    exit_code = EXIT_RESOURCE


class MissingExtraError(SvdexportError):
    """An optional part of the package is not installed.

    Args:
        extra: name of the pip extra that provides it, for example ``"gguf"``.
        what: what cannot be done without it.
    """

    exit_code = EXIT_USAGE

    def __init__(self, extra: str, what: str = "this") -> None:
        super().__init__(f"{what} needs an optional part: pip install 'svdexport[{extra}]'")
        self.extra = extra
