"""Named benchmarks: one strict YAML file each in `data_manifests/benchmarks`.

A benchmark says which images are predicted and which heights they are scored by, what is left out, which
scores others have published on it, and which models have seen the place in training. It never holds pixels.
"""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from canopy.config import Named, Settings, check_known, load_named
from canopy.runtime import manifests_dir
from canopy.sources.label_manifest import known_labels, label_source
from canopy.sources.manifest import known_names

METRICS = (
    "n", "mae_m", "rmse_m", "bias_m", "r2", "r", "nmae", "nmae_plus1", "block_r2", "edge_error",
    "edge_error_symmetric", "cover_iou_2m", "cover_iou_3m", "cover_iou_5m", "cover_precision_2m",
    "cover_recall_2m", "cover_f1_2m", "p50_error_m", "p95_error_m", "p98_error_m", "interval_coverage",
    "interval_width_m",
)  # fmt: skip
Seen = Literal["yes", "near", "no", "unknown"]


class Rows(Settings):
    """Rows of a pack's manifest.csv; fields left out mean any.

    Attributes:
        split: train, val, test, test_hard.
        kind, not_kind: neon (plots) or other (tiles).
        site: pattern such as `Natural Bridge*`.
    """

    split: str
    kind: str | None = None
    not_kind: str | None = None
    site: str | None = None

    def takes(self, row: dict[str, str]) -> bool:
        """Whether a row of the manifest belongs to this group."""
        return (
            row["split"] == self.split
            and (self.kind is None or row["kind"] == self.kind)
            and (self.not_kind is None or row["kind"] != self.not_kind)
            and (self.site is None or fnmatch.fnmatch(row["site"], self.site))
        )


class Group(Settings):
    """Scenes that are pooled into one score.

    Attributes:
        title: what they are.
        rows: of a pack; None: every reference file of the benchmark whose name matches `match`.
        match: regular expression for reference file names.
        per_site: also show every site as a line of its own.
        shift: whether to measure a shift (not on plots of a few pixels).
    """

    title: str
    rows: Rows | None = None
    match: str | None = None
    per_site: bool = False
    shift: bool = True

    @field_validator("match")
    @classmethod
    def _match_compiles(cls, value: str | None) -> str | None:
        if value is not None:
            re.compile(value)
        return value


class Reference(Settings):
    """Where the measured heights come from.

    Attributes:
        labels: a manifest of data_manifests/labels; None: files that come with the benchmark.
        product: of that source; points need `canopy data chm` first.
        sites: its sites, for `canopy data get --site`.
        floor_m: heights below count as 0 on both sides; None: what the reference's own tags say.
        datetime: which acquisitions.
    """

    labels: str | None
    product: str | None = None
    sites: tuple[str, ...] = ()
    floor_m: float | None = Field(default=None, ge=0, le=10)
    datetime: str | None = None


class Published(Settings):
    """Scores that others have published, to stand beside ours.

    Attributes:
        model: whose. scores: metric -> value, named and measured as ours are.
        measured_on: what exactly they were measured on. source: where they were read.
        comparable: whether scenes and rules are the same as here.
        note: what else a reader must know.
    """

    model: str
    scores: dict[str, float] = Field(min_length=1)
    measured_on: str
    source: str = Field(min_length=1)
    comparable: bool = False
    note: str = ""

    @field_validator("scores")
    @classmethod
    def _known_metrics(cls, value: dict[str, float]) -> dict[str, float]:
        unknown = sorted(set(value) - set(METRICS))
        if unknown:
            raise ValueError(f"unknown metric {unknown[0]!r}; known: {', '.join(METRICS)}")
        return value


class Leak(Settings):
    """Whether a model saw the place in training.

    Attributes:
        models: patterns of model names (a card's `name`, or what --model was given).
        seen: yes (trained on it), near (on other tiles of the same sites), no, unknown.
        why: one sentence. groups: to which groups it applies; empty: all.
        source: where this was read.
    """

    models: tuple[str, ...] = Field(min_length=1)
    seen: Seen
    why: str = Field(min_length=1)
    groups: tuple[str, ...] = ()
    source: str = Field(min_length=1)

    def concerns(self, name: str) -> bool:
        """Whether a model of that name is meant."""
        return any(fnmatch.fnmatch(name.lower(), pattern.lower()) for pattern in self.models)


class Exclusion(Settings):
    """Scenes that are left out, and why. `match`: regular expression for reference file names or row ids."""

    match: str
    why: str = Field(min_length=1)


class BenchmarkManifest(Named):
    """One benchmark.

    Attributes:
        name: what `--benchmark` takes; the file's stem. title: one line.
        layout: `pack` (a folder with manifest.csv that pairs images and heights) or `folders` (DIR/reference
            with height rasters, DIR/imagery with the images that cover them).
        reference: the heights. imagery: named source used where DIR/imagery is absent; None: DIR/imagery is
            needed.
        image_nodata: image value that means missing; None: as the files say.
        get: commands that fill DIR, with `{dir}` for it.
        groups: what is pooled, in order of the table.
        metrics: columns of the table.
        exclusions: scenes left out.
        published: others' scores. leakage: who has seen the place.
        area: [west, south, east, north] of the place in degrees; None where it is many.
        licence: terms of the data. notes: what a user should know.
    """

    title: str
    layout: Literal["pack", "folders"]
    reference: Reference
    imagery: str | None = None
    image_nodata: float | None = None
    get: tuple[str, ...] = Field(min_length=1)
    groups: dict[str, Group] = Field(min_length=1)
    metrics: tuple[str, ...] = Field(min_length=1)
    exclusions: tuple[Exclusion, ...] = ()
    published: tuple[Published, ...] = ()
    leakage: tuple[Leak, ...] = Field(min_length=1)
    area: tuple[float, float, float, float] | None = None
    licence: str
    notes: str = ""

    @model_validator(mode="after")
    def _parts_fit(self) -> BenchmarkManifest:
        for name in self.metrics:
            if name not in METRICS:
                raise ValueError(f"unknown metric {name!r}; known: {', '.join(METRICS)}")
        for name, group in self.groups.items():
            if (self.layout == "pack") != (group.rows is not None):
                raise ValueError(f"group {name!r}: rows go with layout pack, and only with it")
        for leak in self.leakage:
            stray = sorted(set(leak.groups) - set(self.groups))
            if stray:
                raise ValueError(f"leakage names the group {stray[0]!r}, which is not in groups")
        self._check_sources()
        return self

    def _check_sources(self) -> None:
        labels, product = self.reference.labels, self.reference.product
        if labels is not None:
            if labels not in known_labels():
                raise ValueError(f"reference: no label source {labels!r}")
            label_source(labels).product(product)
        if self.imagery is not None and self.imagery not in known_names():
            raise ValueError(f"no imagery source {self.imagery!r}")

    def leak_of(self, names: tuple[str, ...], group: str) -> Leak | None:
        """What is known of a model (by any of its names) on a group; the first entry that fits."""
        for leak in self.leakage:
            if (not leak.groups or group in leak.groups) and any(leak.concerns(name) for name in names):
                return leak
        return None


def benchmarks_dir() -> Path:
    """Folder of the manifests."""
    return manifests_dir() / "benchmarks"


def known_benchmarks() -> list[str]:
    """Names, sorted."""
    return sorted(path.stem for path in benchmarks_dir().glob("*.yaml"))


def benchmark(name: str) -> BenchmarkManifest:
    """A benchmark by name.

    Raises:
        InputError: no such benchmark; names the nearest one and lists all.
        ConfigError: its file breaks the schema.
    """
    check_known(name, known_benchmarks(), "benchmark")
    return load_named(BenchmarkManifest, benchmarks_dir() / f"{name}.yaml")
