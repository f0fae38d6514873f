"""The table of published models, `data_manifests/models.yaml`: what `--model` can download by name."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from canopy.config import Settings, load_settings
from canopy.runtime import manifests_dir


class WeightFile(Settings):
    """One file to download.

    Attributes:
        url: where from.
        bytes, sha256: what it must be; None where its publisher does not say.
    """

    url: str = Field(pattern=r"^https?://")
    bytes: int | None = Field(default=None, gt=0)
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")


class PublishedModel(Settings):
    """A model that others published.

    Attributes:
        title: one line for lists.
        licence, source: its terms and its paper.
        size_gb: of the download, about.
        parameters_m: millions of parameters, about.
        gsd_m: ground sample distance it expects, metres.
        files: the checkpoint, and for an original v2 its backbone as a second file.
        hub: `hf://owner/name` instead of files, with `@revision` if one is meant.
        terms_at: page where access must be asked for, if it must.
        notes: what a user should know.
    """

    title: str
    licence: str
    source: str
    size_gb: float = Field(gt=0)
    parameters_m: int | None = Field(default=None, gt=0)
    gsd_m: float | None = Field(default=None, gt=0)
    files: tuple[WeightFile, ...] = Field(default=(), max_length=2)
    hub: str | None = Field(default=None, pattern=r"^hf://[\w.-]+/[\w.-]+(@[\w./-]+)?$")
    terms_at: str | None = None
    notes: str = ""

    @model_validator(mode="after")
    def _has_one_origin(self) -> PublishedModel:
        if bool(self.files) == bool(self.hub):
            raise ValueError("give either files or hub")
        return self

    @property
    def origin(self) -> str:
        """Where it comes from, in one piece of text."""
        return self.hub or ", ".join(file.url for file in self.files)


class Catalogue(Settings):
    """All of models.yaml."""

    models: dict[str, PublishedModel]


def published_models() -> dict[str, PublishedModel]:
    """The table, in its own order.

    Raises:
        ConfigError: the file is missing, or a field is unknown, missing or wrong.
    """
    return dict(load_settings(Catalogue, manifests_dir() / "models.yaml").models)


def facts(entry: PublishedModel) -> dict[str, Any]:
    """JSON-ready: an entry with how to get it."""
    how = "downloaded at first use by --model"
    if entry.terms_at:
        how = f"accept the terms at {entry.terms_at}, log in with `hf auth login` or set HF_TOKEN; then {how}"
    return {**entry.model_dump(mode="json"), "origin": entry.origin, "how": how}
