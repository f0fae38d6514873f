"""What licences allow: whose names go with a map, and whether it may be used commercially.

Nothing here is legal advice: it repeats what publishers state, and says "ask" where that is not plain.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from canopy.config import Settings


def _word(value: Any) -> Any:
    """YAML reads a bare yes and no as true and false."""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value


Use = Annotated[Literal["yes", "no", "ask"], BeforeValidator(_word)]
"""Whether something may be used commercially; `ask`: its terms are its own, unknown, or differ by item."""

_NO = re.compile(r"\bnc\b|non-?commercial|research[- ]only", re.IGNORECASE)
_YES = re.compile(
    r"apache|\bmit\b|\bbsd\b|\bcc0\b|cc[ -]by[ -](sa[ -])?\d|public domain|licence ouverte", re.IGNORECASE
)
# As SPDX names them, which is what STAC asks for.
_SPDX = (
    (r"cc[ -]by[ -]nc[ -]4", "CC-BY-NC-4.0"), (r"cc[ -]by[ -]4", "CC-BY-4.0"), ("cc0", "CC0-1.0"),
    (r"licence ouverte 2", "etalab-2.0"), (r"apache-2", "Apache-2.0"),
)  # fmt: skip


class Terms(Settings):
    """Under which terms imagery is published.

    Attributes:
        licence, attribution: as the publisher asks for them.
        commercial_use: see `Use`.
    """

    licence: str
    attribution: str
    commercial_use: Use

    @property
    def text(self) -> str:
        """Both in one line, for notes and footers."""
        return f"{self.attribution}, {self.licence}"

    @property
    def spdx(self) -> str:
        """The licence's SPDX identifier, or `other`."""
        found = (name for pattern, name in _SPDX if re.search(pattern, self.licence, re.IGNORECASE))
        return next(found, "other")


def use_of(licence: str) -> Use:
    """What a licence's name says of commercial use.

    >>> use_of("Apache-2.0"), use_of("CC BY-NC 4.0"), use_of("DINOv3 License")
    ('yes', 'no', 'ask')
    """
    if _NO.search(licence):
        return "no"
    return "yes" if _YES.search(licence) else "ask"


def weakest(*uses: Use) -> Use:
    """What may be done with something that is made of several parts.

    >>> weakest("yes", "ask"), weakest("ask", "no")
    ('ask', 'no')
    """
    return min(uses, key=["no", "ask", "yes"].index)
