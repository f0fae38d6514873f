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
    from canopy.models.checkpoint import describe, resolve_model
    from canopy.models.heads import CARD_KEY

    card = describe(resolve_model(model))["card"]
    if CARD_KEY not in card:
        raise DataError("no calibration", where=model, remedy="run canopy calibrate interval")
    calibration = card[CARD_KEY]
    facts = calibration["facts"]
    name = card.get("name", "unnamed")
    seen = f" ({n} of them seen in training)" if (n := facts.get("seen_in_training")) else ""
    rows = [
        f"Model {name}, method {calibration.get('method', 'spread')}; calibrated with tensors "
        f"`{facts['tensors_sha256'][:12]}` on {facts['chips']} chips of {', '.join(facts['splits'])} of data "
        f"`{facts['data'][:12]}`{seen}, each half verified with the calibration of the other.",
        "",
        "| bands | predicted height | coverage | mean width |",
        "|---:|---|---:|---:|",
    ]
    for table in facts["verified_on_unseen_halves"]:
        rows.append(_row(table["level"], "all", table["overall"]))
        if table["level"] == 0.9:
            rows += [_row(0.9, f"{name} m", row) for name, row in table["by_height"].items()]
            true = table.get("by_truth", {}).items()
            rows += [_row(0.9, f"(true height {name} m)", row) for name, row in true]
    rows += _new_places(facts)
    rows += ["", "| 90 % intervals of means over | unseen halves | mean width | new places: mean, worst "
             "| width | " + " | ".join(facts["elsewhere"]) + " |",
             "|---:|---:|---:|---:|---:|" + "---:|" * len(facts["elsewhere"])]  # fmt: skip
    for size, row in facts.get("areas_on_unseen_halves", {}).items():
        new = facts.get("areas_in_new_places", {}).get(size)
        worst = (
            f"{_percent(new)}, {100 * new['worst']:.1f} % | {new['mean_width_m']:.1f} m" if new else "- | -"
        )
        others = [_percent(t.get("areas", {}).get(size)) for t in facts["elsewhere"].values()]
        width = f"{row['mean_width_m']:.1f} m"
        rows.append(f"| {size} m | {_percent(row)} | {width} | {worst} | {' | '.join(others)} |")
    return "\n".join(rows) + "\n"


def _new_places(facts: dict[str, Any]) -> list[str]:
    """Places that models were kept from, and the test rows."""
    rows = ["", "| 90 % bands in | as in seen places | coverage | mean width |", "|---|---:|---:|---:|"]
    for site, row in (facts.get("new_places") or {}).get("places", {}).items():
        rows.append(
            f"| {site.split(' (')[0]}, by a model kept from it | {100 * row['as_seen']:.1f} % "
            f"| {_percent(row)} | {row['mean_width_m']:.1f} m |"
        )
    for split, table in facts["elsewhere"].items():
        all_, seen = table["overall"], table.get("as_seen")
        coverage = (_percent(seen), _percent(all_)) if seen else (_percent(all_), "-")
        rows.append(f"| {split} rows | {coverage[0]} | {coverage[1]} | {all_['mean_width_m']:.1f} m |")
    return rows


def _row(level: float, what: str, row: dict[str, Any]) -> str:
    return f"| {100 * level:.0f} % | {what} | {_percent(row)} | {row['mean_width_m']:.1f} m |"


def _percent(row: dict[str, Any] | None) -> str:
    return "-" if row is None else f"{100 * row['coverage']:.1f} %"


if __name__ == "__main__":
    raise SystemExit(main())
