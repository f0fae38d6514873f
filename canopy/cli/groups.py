"""Options in groups: a command takes a dataclass, a user types its fields as options.

Commands that map something share most of what they can be asked; each option is declared once, as a field.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_type_hints


def takes_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Spread those parameters of a typer command that are dataclasses into one option per field.

    The fields' types are `Annotated[..., typer.Option(...)]`, each with a default; the command gets the
    dataclass, filled. Its other parameters stay as they are. Meant as a decorator.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, type] = {}
    spread: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        kind = hints[parameter.name]
        if not (isinstance(kind, type) and is_dataclass(kind)):
            spread.append(parameter.replace(annotation=kind, kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        groups[parameter.name] = kind
        types = get_type_hints(kind, include_extras=True)
        for field in fields(kind):
            if field.default is MISSING:
                raise TypeError(f"{kind.__name__}.{field.name} needs a default")
            spread.append(
                inspect.Parameter(
                    field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default,
                    annotation=types[field.name],
                )
            )  # fmt: skip

    @functools.wraps(command)
    def run(**given: Any) -> None:
        filled = {
            name: kind(**{field.name: given.pop(field.name) for field in fields(kind)})
            for name, kind in groups.items()
        }
        command(**given, **filled)

    run.__signature__ = inspect.Signature(spread)  # type: ignore[attr-defined]
    return run
