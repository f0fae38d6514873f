"""Every error that canopy raises on purpose.

The command line prints the message of a `CanopyError` as one line and exits with its `exit_code`
(2 for bad input, 1 for everything else); anything that is not a `CanopyError` is a bug.
Each class is also the matching built-in kind, so that library users can catch `ValueError` or `OSError`.
"""

from __future__ import annotations

from collections.abc import Mapping


class CanopyError(Exception):
    """Root of the tree. `exit_code` is what the command line returns for it."""

    exit_code = 1

    def __init__(
        self, what: str, *, where: object = None, expected: str | None = None, remedy: str | None = None
    ) -> None:
        """Build the one-line message.

        Args:
            what: what was found, in plain words.
            where: the file, option, URL or area it concerns.
            expected: what would have been right.
            remedy: what the user can do about it.
        """
        self.what, self.where, self.expected, self.remedy = what, where, expected, remedy
        super().__init__(self._line())

    def __reduce__(self):  # type: ignore[no-untyped-def]
        # Keyword-only arguments need help to survive the trip from a worker process.
        return _rebuild, (type(self), self.what, self.where, self.expected, self.remedy)

    def _line(self) -> str:
        parts = [f"{self.where}: {self.what}" if self.where is not None else self.what]
        if self.expected:
            parts.append(f"expected {self.expected}")
        line = "; ".join(parts)
        if self.remedy:
            line = f"{line}. {self.remedy[0].upper()}{self.remedy[1:]}"
        # A file name or a library's text may hold line breaks; the promise is one line.
        return " ".join(line.split())


def _rebuild(
    cls: type[CanopyError], what: str, where: object, expected: str | None, remedy: str | None
) -> CanopyError:
    return cls(what, where=where, expected=expected, remedy=remedy)


class InputError(CanopyError, ValueError):
    """Something the user gave cannot be used. Nothing was written."""

    exit_code = 2


class AreaError(InputError):
    """An area that is empty, crossed, out of range, or without imagery."""


class ImageryError(InputError):
    """An image, or a source of images, that cannot be read as RGB."""


class CheckpointError(InputError):
    """A model file that is truncated, foreign, or does not fit its architecture."""


class ConfigError(InputError):
    """A setting that is unknown or has a value outside its range."""


class DataError(InputError):
    """A label, manifest or chip that breaks its schema."""


class FetchError(ImageryError, OSError):
    """A remote host that did not give what was asked, after the retries."""


class MissingDependencyError(InputError, ImportError):
    """An optional library that the command needs is not installed."""


class OutputError(CanopyError, OSError):
    """An output that could not be written completely; no partial file is left."""


def refuse_options(given: Mapping[str, object], *, where: object, because: str) -> None:
    """Refuse options that have no use here; ignored in silence they would be believed to have worked.

    Args:
        given: options as the user writes them, with their values; None and () were not given.
        where: the source, or the option, that has no use for them.
        because: why, in a few words.

    Raises:
        InputError: one of them was given.
    """
    useless = [name for name, value in given.items() if value is not None and value != ()]
    if useless:
        raise InputError(because, where=where, remedy=f"leave {', '.join(useless)} out")


def require(what: str, install: str, *modules: str) -> None:
    """Refuse work whose optional libraries are not installed.

    Args:
        what: that needs them, in the plural.
        install: what pip installs them by.
        modules: of the libraries.

    Raises:
        MissingDependencyError: names the library and how to have it.
    """
    for module in modules:
        try:
            __import__(module)
        except ImportError as error:
            raise MissingDependencyError(
                f"{what} need {module.split('.')[0]}", remedy=f"run: pip install '{install}'"
            ) from error
