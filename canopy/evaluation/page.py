"""One self-contained HTML page: headings, paragraphs, tables and inline pictures; nothing is loaded from
anywhere.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; color: #20262b;
  background: #fff; margin: 0 auto; padding: 1.5rem 1.2rem 4rem; max-width: 62rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .2rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; border-bottom: 2px solid #d8dde0; padding-bottom: .2rem; }
p.lead { color: #47525a; margin: 0 0 1rem; }
p, li { max-width: 48rem; }
table { border-collapse: collapse; margin: .6rem 0 1rem; font-size: .92rem; font-variant-numeric:
tabular-nums; } caption { text-align: left; color: #47525a; font-size: .9rem; padding-bottom: .3rem; }
th, td { padding: .28rem .7rem; border-bottom: 1px solid #e1e5e7; text-align: right; vertical-align: top; }
th { background: #f3f5f6; font-weight: 600; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
td { white-space: nowrap; }
td.text { white-space: normal; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
figure { margin: 1rem 0 1.4rem; }
figure img { max-width: 100%; height: auto; }
figcaption { color: #47525a; font-size: .9rem; max-width: 48rem; }
ul.notes { background: #fff6e0; border-left: 4px solid #e69f00; padding: .7rem 1rem .7rem 2rem; margin: 1rem
0; } .small { color: #47525a; font-size: .85rem; }
@media print {
  body { max-width: none; padding: 0; font-size: 10.5pt; }
  h2 { break-after: avoid; }
  figure, tr { break-inside: avoid; }
  .wide { overflow: visible; }
  table { font-size: 8.5pt; }
  th, td { padding: .15rem .4rem; }
  @page { margin: 15mm; }
}
"""


class Page:
    """Collects parts in reading order; `html()` gives the document."""

    def __init__(self, title: str, lead: str = "") -> None:
        self.title = title
        self._parts = [f"<h1>{escape(title)}</h1>"]
        if lead:
            self._parts.append(f'<p class="lead">{escape(lead)}</p>')

    def heading(self, text: str) -> None:
        """A section's heading."""
        self._parts.append(f"<h2>{escape(text)}</h2>")

    def text(self, text: str, small: bool = False) -> None:
        """A paragraph."""
        opening = '<p class="small">' if small else "<p>"
        self._parts.append(f"{opening}{escape(text)}</p>")

    def notes(self, notes: Iterable[str]) -> None:
        """A marked list; nothing where there is none."""
        items = "".join(f"<li>{escape(note)}</li>" for note in notes)
        if items:
            self._parts.append(f'<ul class="notes">{items}</ul>')

    def table(
        self,
        headers: Sequence[str],
        rows: Iterable[Sequence[Any]],
        caption: str = "",
        text_columns: Iterable[int] = (),
    ) -> None:
        """A table; the first column and `text_columns` are left-aligned, None is a dash."""
        style = ['class="text"' if i in set(text_columns) else "" for i in range(len(headers))]

        def line(tag: str, cells: Sequence[Any]) -> str:
            marked = (
                f"<{tag} {how}".rstrip() + f">{escape(cell_text(c))}</{tag.split()[0]}>"
                for how, c in zip(style, cells, strict=True)
            )
            return f"<tr>{''.join(marked)}</tr>"

        head = line('th scope="col"', headers)
        body = "".join(line("td", row) for row in rows)
        title = f"<caption>{escape(caption)}</caption>" if caption else ""
        self._parts.append(
            f'<div class="wide"><table>{title}<thead>{head}</thead><tbody>{body}</tbody></table></div>'
        )

    def facts(self, facts: Mapping[str, Any]) -> None:
        """Nested plain data as a two-column table, names joined by dots."""
        self.table(["fact", "value"], list(_flat(facts)), text_columns=(1,))

    def figure(self, png: bytes, caption: str, alt: str) -> None:
        """A picture, embedded."""
        data = base64.b64encode(png).decode("ascii")
        self._parts.append(
            f'<figure><img src="data:image/png;base64,{data}" alt="{escape(alt)}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )

    def html(self) -> str:
        """The whole document."""
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self.title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
            + "\n".join(self._parts)
            + "\n</body>\n</html>\n"
        )


def cell_text(value: Any) -> str:
    """A value as a person reads it: numbers with about four digits, None as a dash."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return number_text(value)
    return str(value)


def number_text(value: float) -> str:
    """
    >>> number_text(12345.6), number_text(3.14159), number_text(-0.0004)
    ('12,346', '3.14', '0.00')
    """
    if value != value:
        return "-"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    text = f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}"
    return text.removeprefix("-") if not float(text) else text


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in facts.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}.")
        elif isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
            for i, part in enumerate(value, 1):
                yield from _flat(part, f"{name}.{i}.")
        elif isinstance(value, list | tuple):
            yield name, ", ".join(cell_text(part) for part in value) or "-"
        else:
            yield name, cell_text(value)
