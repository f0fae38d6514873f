"""A matrix of runs, one after another: train, score on val and on unseen sites, one row each in a table."""

from __future__ import annotations

import csv
import json
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from canopy.chips.index import replacing
from canopy.config import Settings, load_settings
from canopy.errors import CanopyError, ConfigError
from canopy.models.checkpoint import load_model
from canopy.runtime import log
from canopy.training.baselines import fit_baselines
from canopy.training.data import WholeChips, open_data, split_chips
from canopy.training.fit import MODEL, finetune
from canopy.training.run_folder import LAST
from canopy.training.scoring import Table, headline, plain, predict_chip, score
from canopy.training.settings import DataSettings, FinetuneSettings

OVERLAP_PX = 64
RESULTS = "results.csv"
_SHOWN = ("mae_m", "r", "r2", "bias_m", "block_r2", "edge_error", "bias_20-30_m", "bias_30-60_m")
_FACTS = ("run", "name", "share", "seed", "steps", "minutes", "parameters")
_ORIGIN = ("started_from", "exported", "data", "commit", "hardware", "date", "command")


class RunSettings(Settings):
    """One line of the matrix: a config and what differs from it, or a baseline.

    `set` holds settings as the config does; "{name}" in a text stands for the variable of that name, and a
    line whose variable is not given is left out.
    """

    name: str
    config: str = ""
    baseline: Literal["", "constant", "ridge"] = ""
    set: dict[str, Any] = Field(default_factory=dict)
    shares: tuple[float, ...] = ()
    seeds: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _one_of_both(self) -> RunSettings:
        if bool(self.config) == bool(self.baseline):
            raise ValueError("needs either a config or a baseline")
        return self


class MatrixSettings(Settings):
    """`set`, `shares`, `seeds` hold for every line that has none of its own (`set` is merged under it)."""

    splits: tuple[str, ...] = ("val", "test", "test_hard")
    set: dict[str, Any] = Field(default_factory=dict)
    shares: tuple[float, ...] = (1.0,)
    seeds: tuple[int, ...] = (0,)
    runs: tuple[RunSettings, ...]


@dataclass(frozen=True)
class Job:
    """One run: a line of the matrix with a share of the labels and a seed."""

    line: RunSettings
    share: float
    seed: int
    overrides: tuple[str, ...]

    @property
    def id(self) -> str:
        """Name of its folder and of its row."""
        return f"{self.line.name}-{100 * self.share:g}pct-s{self.seed}"


def jobs(matrix: MatrixSettings, variables: Mapping[str, str]) -> Iterator[Job]:
    """Every run of the matrix: seed by seed, and within a seed share by share, so that what time allows is
    comparable at any moment. Baselines run for the first seed only."""
    seeds = list(dict.fromkeys(s for line in matrix.runs for s in line.seeds or matrix.seeds))
    shares = list(dict.fromkeys(s for line in matrix.runs for s in line.shares or matrix.shares))
    missing = {line.name: names for line in matrix.runs if (names := _unset(line.set, variables))}
    for name, names in missing.items():
        log.warning("%s is left out: --var %s=... is not given", name, names[0])
    for seed in seeds:
        for share in shares:
            for line in matrix.runs:
                wanted = share in (line.shares or matrix.shares) and seed in (line.seeds or matrix.seeds)
                if wanted and line.name not in missing and not (line.baseline and seed != seeds[0]):
                    both = _flat(matrix.set) | _flat(line.set)
                    texts = {k: _filled(v, variables) for k, v in both.items()}
                    texts |= {"seed": seed, "data.label_share": share}
                    yield Job(line, share, seed, tuple(f"{k}={json.dumps(v)}" for k, v in texts.items()))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _filled(value: Any, variables: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        for name, text in variables.items():
            value = value.replace(f"{{{name}}}", text)
    return value


def _unset(values: Mapping[str, Any], variables: Mapping[str, str]) -> list[str]:
    texts = [_filled(v, variables) for v in _flat(values).values()]
    return [t[1 : t.index("}")] for t in texts if isinstance(t, str) and t.startswith("{") and "}" in t]


def run_matrix(
    matrix: MatrixSettings, base: Path, chips: Path, folder: Path, variables: Mapping[str, str]
) -> list[str]:
    """Do what is not done yet, and write results.csv and results.md after every run.

    Args:
        matrix: what to run.
        base: folder that the configs' paths count from.
        chips: a chips folder (or chips file).
        folder: gets a folder per run, results.csv, results.md.
        variables: for "{name}" in settings.

    Returns:
        Names of the runs that failed; the reasons are logged, and the others go on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for job in jobs(matrix, variables):
        where = folder / job.id
        if (where / "scores.json").is_file():
            continue
        log.info("%s", job.id)
        try:
            row, scores = _run(job, base, chips, where, matrix.splits)
        except CanopyError as error:
            log.error("%s failed: %s", job.id, error)
            failed.append(job.id)
            continue
        with replacing(where / "scores.json") as part:
            part.write_text(json.dumps({"row": row, "scores": scores}, indent=1))
        write_results(folder)
    write_results(folder)
    return failed


def _run(
    job: Job, base: Path, chips: Path, where: Path, splits: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, Table]]:
    where.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {"run": job.id, "name": job.line.name, "share": job.share, "seed": job.seed}
    started = time.monotonic()
    if job.line.baseline:
        data = open_data(DataSettings(chips=chips, label_share=job.share))
        fitted = fit_baselines(WholeChips(data.train))
        predictor = fitted.constant if job.line.baseline == "constant" else fitted.regression
        facts |= {"minutes": round((time.monotonic() - started) / 60, 2), "data": data.sha256[:12]}
    else:
        overrides = [*job.overrides, f"data.chips={json.dumps(str(chips))}"]
        settings = load_settings(FinetuneSettings, base / job.line.config, overrides)
        if not (where / MODEL).is_file():
            finetune(settings, where, resume=(where / LAST).is_file(), command=_command(job))
        model = load_model(where / MODEL, device=settings.device)
        card, side = model.card, model.config.crop_px
        facts |= {k: card[k] for k in ("steps", "minutes", "parameters", "exported")}
        facts |= {"data": card["data"]["sha256"][:12]}
        facts["started_from"] = card.get("started_from", {}).get("file", "random weights")

        def predictor(chip):  # type: ignore[no-untyped-def]
            return predict_chip(model, chip, side, OVERLAP_PX)

    facts |= {"commit": commit(), "hardware": hardware(), "date": time.strftime("%Y-%m-%d", time.gmtime())}
    facts["command"] = _command(job)
    scores = {s: plain(score(found, predictor)) for s in splits if len(found := split_chips(chips, s))}
    return facts | _summary(scores), scores


def _summary(scores: dict[str, Table]) -> dict[str, float | None]:
    return {f"{split} {k}": headline(t)[k] for split, t in scores.items() for k in _SHOWN}


def _command(job: Job) -> str:
    """How to repeat the run alone; folders are this machine's business, so files go by name."""
    if job.line.baseline:
        return f"baseline {job.line.baseline} at data.label_share={job.share:g}"
    pairs = (override.split("=", 1) for override in job.overrides)
    texts = [f"{key}={value.split('/')[-1]}" for key, value in pairs]
    return f"canopy train {Path(job.line.config).name} " + " ".join(t.replace('"', "") for t in texts)


def commit() -> str:
    """The checkout's commit, with + where files differ from it; '' outside a checkout."""
    top = Path(__file__).resolve().parents[2]
    try:
        short = ["git", "-C", str(top), "describe", "--always", "--dirty=+", "--exclude", "*"]
        return subprocess.run(short, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def hardware() -> str:
    """The GPU's name, or the processor's and torch's number of threads."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [
            x.split(":", 1)[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")
        ]
        name = lines[0] if lines else name
    return f"{name}, {torch.get_num_threads()} thread(s)"


def write_results(folder: Path) -> None:
    """results.csv and results.md from the scores.json of every run folder."""
    found = [json.loads(p.read_text()) for p in sorted(folder.glob("*/scores.json"))]
    if not found:
        return
    rows = [f["row"] for f in found]
    columns = list(dict.fromkeys([*_FACTS, *(k for r in rows for k in r if k not in _ORIGIN), *_ORIGIN]))
    with replacing(folder / RESULTS) as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    with replacing(folder / "results.md") as part:
        part.write_text(markdown(found))


def markdown(found: list[dict[str, Any]]) -> str:
    """A table of all runs, one of every site's MAE and correlation, and one of what was run."""
    splits = list(dict.fromkeys(s for f in found for s in f["scores"]))
    heads = [f"{s} {k}" for s in splits for k in _SHOWN]
    main = [["run", "min", *heads]]
    sites = [["run", *(f"{s}: {site}" for s in splits for site in _sites(found, s))]]
    origin = [["run", *_ORIGIN]]
    for f in found:
        row = f["row"]
        main.append([row["run"], _text(row.get("minutes")), *(_text(row.get(h)) for h in heads)])
        cells = [f["scores"].get(s, {}).get(site) for s in splits for site in _sites(found, s)]
        sites.append([row["run"], *(f"{_text(c['mae_m'])} ({_text(c['r'])})" if c else "-" for c in cells)])
        origin.append([row["run"], *(str(row.get(k, "-")) for k in _ORIGIN)])
    parts = ["## Scores (without plots)", _table(main), "## MAE in metres (r) of every site", _table(sites)]
    return "\n\n".join([*parts, "## What was run", _table(origin)]) + "\n"


def _sites(found: list[dict[str, Any]], split: str) -> list[str]:
    pooled = ("all but plots", "plots", "all")
    return [s for s in dict.fromkeys(k for f in found for k in f["scores"].get(split, {})) if s not in pooled]


def _text(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else "-" if value is None else str(value)


def _table(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]])


def load_matrix(path: Path, overrides: list[str]) -> MatrixSettings:
    """Read a matrix; two lines of one name are a ConfigError."""
    matrix = load_settings(MatrixSettings, path, overrides)
    names = [line.name for line in matrix.runs]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ConfigError(f"two runs are called {twice[0]!r}", where=path)
    return matrix
