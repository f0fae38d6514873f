"""Tables of a model's calibration: `python pipelines/calibration_report.py MODEL [--docs FILE.md]`.

With --docs they replace what stands between `<!-- calibration -->` and `<!-- /calibration -->` in a file.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from canopy.errors import CanopyError, DataError

_PLACE = re.compile(r"(<!-- calibration -->\n).*?(<!-- /calibration -->)", re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="an embedded name or a file that canopy calibrate interval wrote")
    parser.add_argument("--docs", type=Path, help="Markdown file to bring up to date")
    args = parser.parse_args()
    try:
        text = _report(args.model)
        if args.docs is None:
            print(text)
            return 0
        page = args.docs.read_text()
        if not _PLACE.search(page):
            raise DataError("no place marked for the tables", where=args.docs)
        args.docs.write_text(_PLACE.sub(lambda found: found[1] + text + found[2], page))
    except CanopyError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _report(model: str) -> str:
    from canopy.models.intervals import CARD_KEY
    from canopy.models.registry import describe, resolve_model

    card = describe(resolve_model(model))["card"]
    if CARD_KEY not in card:
        raise DataError("no calibration", where=model, remedy="run canopy calibrate interval")
    facts = card[CARD_KEY]["facts"]
    name = card.get("name", "unnamed")
    rows = [
        f"Model {name}, tensors `{facts['tensors_sha256'][:12]}`; {facts['chips']} chips "
        f"of {', '.join(facts['splits'])} of data `{facts['data'][:12]}`, each half verified with the "
        "calibration of the other.",
        "",
        "| bands | predicted height | coverage | mean width |",
        "|---:|---|---:|---:|",
    ]
    for table in facts["verified_on_unseen_halves"]:
        rows.append(_row(table["level"], "all", table["overall"]))
        if table["level"] == 0.9:
            rows += [_row(0.9, f"{name} m", row) for name, row in table["by_height"].items()]
    for split, table in facts["elsewhere"].items():
        rows.append(_row(0.9, f"all, {split} rows", table["overall"]))
    rows += ["", "| 90 % intervals of means over | unseen halves | mean width | "
             + " | ".join(facts["elsewhere"]) + " |",
             "|---:|---:|---:|" + "---:|" * len(facts["elsewhere"])]  # fmt: skip
    for size, row in facts.get("areas_on_unseen_halves", {}).items():
        others = [_percent(t.get("areas", {}).get(size)) for t in facts["elsewhere"].values()]
        rows.append(f"| {size} m | {_percent(row)} | {row['mean_width_m']:.1f} m | {' | '.join(others)} |")
    return "\n".join(rows) + "\n"


def _row(level: float, what: str, row: dict[str, Any]) -> str:
    return f"| {100 * level:.0f} % | {what} | {_percent(row)} | {row['mean_width_m']:.1f} m |"


def _percent(row: dict[str, Any] | None) -> str:
    return "-" if row is None else f"{100 * row['coverage']:.1f} %"


if __name__ == "__main__":
    raise SystemExit(main())
