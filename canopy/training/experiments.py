"""A matrix of runs, one after another: train, score on val and on unseen sites, one row each in a table."""

from __future__ import annotations

import json
import platform
import re
import shlex
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from canopy.config import Settings, load_settings, validate_settings
from canopy.errors import CanopyError, ConfigError
from canopy.files import replacing
from canopy.models.checkpoint import load_model
from canopy.runtime import log
from canopy.training.baselines import fit_baselines
from canopy.training.data import TrainingData, WholeChips, open_data, split_chips
from canopy.training.experiments_table import summary, write_results
from canopy.training.fit import MODEL, finetune
from canopy.training.run_folder import LAST
from canopy.training.scoring import Predictor, Table, plain, predict_chip, score
from canopy.training.settings import DataSettings, FinetuneSettings

if TYPE_CHECKING:
    from canopy.models.height import HeightModel

OVERLAP_PX = 64
_VARIABLE = re.compile(r"\{(\w[\w-]*)\}")  # in a text of a matrix, set by --var


class LineSettings(Settings):
    """One line of the matrix: a config and what differs from it, a baseline, or a model to score as it is.

    `set` holds settings as the config does; "{name}" in a text stands for the variable of that name, and a
    line whose variable is not given is left out.
    """

    name: str
    config: str = ""
    baseline: Literal["", "constant", "ridge"] = ""
    model: str = ""  # an embedded name or a file
    set: dict[str, Any] = Field(default_factory=dict)
    shares: tuple[float, ...] = ()
    seeds: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _one_of_them(self) -> LineSettings:
        if sum(map(bool, (self.config, self.baseline, self.model))) != 1:
            raise ValueError("needs either a config, a baseline or a model")
        return self


class MatrixSettings(Settings):
    """`set`, `shares`, `seeds` hold for every line that has none of its own (`set` is merged under it).

    `folds`: names with sites each; every line is run once per fold with these as `data.val_sites`, and its
    split 'val' is these sites.
    """

    splits: tuple[str, ...] = ("val", "test", "test_hard")
    set: dict[str, Any] = Field(default_factory=dict)
    shares: tuple[float, ...] = (1.0,)
    seeds: tuple[int, ...] = (0,)
    folds: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    runs: tuple[LineSettings, ...]


@dataclass(frozen=True)
class Job:
    """One run: a line of the matrix with a fold, a share of the labels and a seed."""

    line: LineSettings
    fold: str
    share: float
    seed: int
    overrides: tuple[str, ...]

    @property
    def id(self) -> str:
        """Name of its folder and of its row."""
        name = f"{self.line.name}-{self.fold}" if self.fold else self.line.name
        return f"{name}-{100 * self.share:g}pct-s{self.seed}"


def jobs(matrix: MatrixSettings, variables: Mapping[str, str]) -> Iterator[Job]:
    """Every run of the matrix: seed by seed, within a seed share by share, within a share fold by fold, so
    that what time allows is comparable at any moment. Baselines run for the first seed only; models that are
    there already are scored once."""
    seeds = list(dict.fromkeys(s for line in matrix.runs for s in line.seeds or matrix.seeds))
    shares = list(dict.fromkeys(s for line in matrix.runs for s in line.shares or matrix.shares))
    missing = {
        r.name: names
        for r in matrix.runs
        if (names := _unset(_flat(matrix.set) | r.set | {"": r.model}, variables))
    }
    for name, names in missing.items():
        log.warning("%s is left out: --var %s=... is not given", name, names[0])
    folds = matrix.folds or {"": ()}
    for seed, share, (fold, sites), line in product(seeds, shares, folds.items(), matrix.runs):
        wanted = share in (line.shares or matrix.shares) and seed in (line.seeds or matrix.seeds)
        again = (line.baseline or line.model) and seed != seeds[0]
        again = again or (line.model and share != (line.shares or matrix.shares)[0])
        if wanted and line.name not in missing and not again:
            line = line.model_copy(update={"model": _filled(line.model, variables)})
            both = _flat(matrix.set) | _flat(line.set)
            texts = {k: _filled(v, variables) for k, v in both.items()}
            texts |= {"data.val_sites": sites} if sites else {}
            texts |= {"seed": seed, "data.label_share": share}
            yield Job(line, fold, share, seed, tuple(f"{k}={json.dumps(v)}" for k, v in texts.items()))


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
    texts = [v for v in _flat(values).values() if isinstance(v, str)]
    return [name for text in texts for name in _VARIABLE.findall(text) if name not in variables]


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
    keep = [f"data.chips={json.dumps(str(chips))}", *job.overrides]
    if job.line.baseline:
        predictor, data, facts = _baseline(job, keep)
    elif job.line.model:
        predictor, data, facts = _given(job, keep)
    else:
        predictor, data, facts = _trained(job, base, keep, where)
    facts = {"run": job.id, "name": job.line.name, "share": job.share, "seed": job.seed, **facts}
    facts |= {"fold": job.fold} if job.fold else {}
    facts |= {"data": data.sha256[:12], "commit": commit(), "hardware": hardware()}
    facts |= {"date": time.strftime("%Y-%m-%d", time.gmtime()), "command": _command(job)}
    # With a fold, val is the sites that this run has not seen, and not the split of that name.
    chosen = {s: data.val if s == "val" and job.fold else split_chips(chips, s) for s in splits}
    scores = {s: plain(score(found, predictor)) for s, found in chosen.items() if len(found)}
    return facts | summary(scores), scores


def _baseline(job: Job, overrides: list[str]) -> tuple[Predictor, TrainingData, dict[str, Any]]:
    started = time.monotonic()
    data = _data(job, overrides, None)
    fitted = fit_baselines(WholeChips(data.train))
    predictor = fitted.constant if job.line.baseline == "constant" else fitted.regression
    return predictor, data, {"minutes": round((time.monotonic() - started) / 60, 2)}


def _given(job: Job, overrides: list[str]) -> tuple[Predictor, TrainingData, dict[str, Any]]:
    model = load_model(job.line.model)
    facts: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    data = _data(job, overrides, model.config.gsd_m)
    return _predictor(model), data, facts | {"started_from": model.card.get("name", "-")}


def _data(job: Job, overrides: list[str], gsd_m: float | None) -> TrainingData:
    settings: dict[str, Any] = {}
    for override in overrides:
        key, text = override.split("=", 1)
        if key.startswith("data."):
            settings[key.removeprefix("data.")] = json.loads(text)
    return open_data(validate_settings(DataSettings, settings, job.id), gsd_m)


def _predictor(model: HeightModel) -> Predictor:
    return lambda chip: predict_chip(model, chip, model.config.crop_px, OVERLAP_PX)


def _trained(
    job: Job, base: Path, overrides: list[str], where: Path
) -> tuple[Predictor, TrainingData, dict[str, Any]]:
    settings = load_settings(FinetuneSettings, base / job.line.config, overrides)
    data = open_data(settings.data, settings.architecture.gsd_m)
    if not (where / MODEL).is_file():
        finetune(settings, where, resume=(where / LAST).is_file(), command=_command(job))
    model = load_model(where / MODEL, device=settings.device)
    card = model.card
    facts = {k: card[k] for k in ("steps", "minutes", "parameters", "exported")}
    facts["started_from"] = card.get("started_from", {}).get("file", "random weights")
    return _predictor(model), data, facts


def _command(job: Job) -> str:
    """How to repeat the run alone; folders are this machine's business, so files go by name."""
    if job.line.baseline:
        fold = f" without the places of {job.fold}" if job.fold else ""
        return f"baseline {job.line.baseline} at data.label_share={job.share:g}{fold}"
    if job.line.model:
        return f"model {Path(job.line.model).name} as it is"
    pairs = (override.split("=", 1) for override in job.overrides)
    texts = [f"{key}={value.split('/')[-1]}" for key, value in pairs]
    return shlex.join(["canopy", "train", Path(job.line.config).name, *(t.replace('"', "") for t in texts)])


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


def load_matrix(path: Path, overrides: list[str]) -> MatrixSettings:
    """Read a matrix; two lines of one name are a ConfigError."""
    matrix = load_settings(MatrixSettings, path, overrides)
    names = [line.name for line in matrix.runs]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ConfigError(f"two runs are called {twice[0]!r}", where=path)
    return matrix
