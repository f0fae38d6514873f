"""From a model's name, file, folder or `hf://` address to a loaded model; the table of published models.

Published models are downloaded at first use, converted once, and kept in the cache.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from pydantic import Field, model_validator

from canopy.config import Settings, load_settings
from canopy.errors import CheckpointError, ConfigError, FetchError
from canopy.files import check_digest, file_sha256
from canopy.models.checkpoint import FORMAT, RUN_MODEL, load_checkpoint, pickle_error
from canopy.runtime import cache_dir, log, manifests_dir
from canopy.terms import use_of

if TYPE_CHECKING:
    import torch

    from canopy.models.height import HeightModel

WEIGHTS_DIR = Path(__file__).parent / "weights"
# Names people can type, and the embedded file each stands for.
EMBEDDED = {"default": "canopy-lite-v5.safetensors"}
# Raise when a conversion would come out differently: older results in caches are then left alone.
_CONVERTER = 2
_HUB = "hf://"
_HUB_FILES = ["config.json", "preprocessor_config.json", "model.safetensors"]


class WeightFile(Settings):
    """One file to download: where from, and its sha256, None where its publisher does not say."""

    url: str = Field(pattern=r"^https?://")
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

    def facts(self) -> dict[str, Any]:
        """JSON-ready: the entry, with how to get the model."""
        how = "downloaded at first use by --model"
        if self.terms_at:
            how = (
                f"ask for access at {self.terms_at} (granted by hand, usually within days), then log in with "
                f"`hf auth login` or set HF_TOKEN; then {how}"
            )
        facts = {"commercial_use": use_of(self.licence), "origin": self.origin, "how": how}
        return self.model_dump(mode="json") | facts


class _Table(Settings):
    """models.yaml: v1's network of colours, and the models."""

    aerial: WeightFile | None = None
    models: dict[str, PublishedModel]


def published_models() -> dict[str, PublishedModel]:
    """The table of models.yaml, in its own order.

    Raises:
        ConfigError: the file is missing, or a field is unknown, missing or wrong.
    """
    return dict(_table().models)


def _table() -> _Table:
    return load_settings(_Table, manifests_dir() / "models.yaml")


def load_model(name_or_path: str | Path = "default", device: str | torch.device = "cpu") -> HeightModel:
    """Load a model by name ('default', 'v1-huge', 'v2', ...) or from a file, in eval mode on `device`.

    Args:
        name_or_path: an embedded or a published name, a canopy file, the folder of a training run, an
            original v1 or v2 checkpoint, a directory of the hub's layout, or `hf://owner/name`.
        device: where to put it.

    Returns:
        A HeightModel: float RGB (B, 3, H, W) in 0..1 -> metres (B, 1, H, W); with `.card` and `.sha256`.

    Raises:
        CheckpointError: nothing of that name, or a file that cannot be used.
        FetchError: a published model could not be downloaded.
    """
    return load_checkpoint(resolve_model(name_or_path), device)


def resolve_model(name_or_path: str | Path) -> Path:
    """A canopy model file for a name, a file or an `hf://` address; errors as `load_model`."""
    name = str(name_or_path)
    if name in EMBEDDED:
        return WEIGHTS_DIR / EMBEDDED[name]
    if name.startswith(_HUB):
        return _converted([fetch_hub(name)], name)
    path = Path(name).expanduser()
    if path.is_dir() and (path / RUN_MODEL).is_file() and _is_ours(path / RUN_MODEL):
        return path / RUN_MODEL
    if path.suffix == ".ckpt" and path.is_file():
        raise pickle_error(path)
    if path.exists():
        return path if path.is_file() and _is_ours(path) else _converted([path])
    table = published_models()
    if name in table:
        return _published(name, table[name])
    known = [*EMBEDDED, *table]
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.6)
    raise CheckpointError(
        f"no model {name!r}" + (f": did you mean {close[0]!r}?" if close else ""),
        expected=f"a file, hf://owner/name, or one of: {', '.join(known)}",
    )


def _is_ours(path: Path) -> bool:
    """Whether a file says that canopy wrote it, or is too short to say anything."""
    with path.open("rb") as file:
        size = file.read(8)
        header = file.read(min(int.from_bytes(size, "little"), 50_000_000))
    return len(size) < 8 or f'"{FORMAT}"'.encode() in header


def _converted(inputs: Sequence[Path], source: str | None = None, target: Path | None = None) -> Path:
    """The cached conversion of an original checkpoint, made now if there is none.

    Raises:
        CheckpointError: it is none of the published kinds, or needs options of `canopy models convert`.
    """
    folder = cache_dir() / "models" / "converted"
    target = target or folder / f"{_digest(inputs[0])}-{_CONVERTER}.safetensors"
    if target.is_file():
        return target
    from canopy.download import only_one
    from canopy.models.published import convert

    target.parent.mkdir(parents=True, exist_ok=True)
    with only_one(target):
        if not target.is_file():  # no other process was faster
            log.info(f"converting {inputs[0].name} once, into {target.parent}")
            done = convert(inputs[0], target, backbone=inputs[1] if inputs[1:] else None, source=source)
            log.info(f"found {done['found']}; licence {done['licence']}")
    return target


def _digest(path: Path) -> str:
    """sha256 of a file, or of the contents of a model directory."""
    if path.is_file():
        return file_sha256(path)
    files = [path / name for name in _HUB_FILES if (path / name).is_file()]
    return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()


def _published(name: str, entry: PublishedModel) -> Path:
    """The converted file of a published model, downloaded and converted at first use."""
    folder = cache_dir() / "models"
    key = hashlib.sha256(f"{entry.files} {entry.hub}".encode()).hexdigest()[:16]
    target = folder / "converted" / f"{name}-{key}-{_CONVERTER}.safetensors"
    if target.is_file():
        return target
    log.warning(
        f"{name}: {entry.title}; about {entry.size_gb:g} GB from {entry.origin}; "
        f"licence: {entry.licence}; kept in {folder}"
    )
    if entry.hub:
        return _converted([fetch_hub(entry.hub)], entry.hub, target)
    return _converted([_fetched(file, folder / name) for file in entry.files], entry.origin, target)


def _fetched(file: WeightFile, folder: Path) -> Path:
    from canopy.download import download

    path = folder / Path(unquote(urlsplit(file.url).path)).name
    check = functools.partial(check_digest, "sha256", file.sha256) if file.sha256 else None
    return download(file.url, path, check=check)


def aerial_network() -> Path:
    """The checkpoint of v1's aerial normalisation, downloaded at first use.

    Raises ConfigError for a models.yaml without its address; FetchError as `load_model`.
    """
    if (file := _table().aerial) is None:
        raise ConfigError(
            "no address of v1's aerial network", where="models.yaml", expected="aerial: {url: ...}"
        )
    return _fetched(file, cache_dir() / "models" / "v1-aerial")


def fetch_hub(address: str) -> Path:
    """Download a model directory from the Hugging Face hub (resumed, cached and authorised by its library).

    Args:
        address: `hf://owner/name` or `hf://owner/name@revision`.

    Raises:
        CheckpointError: a malformed address, no such model, or access not granted.
        FetchError: the hub did not deliver.
    """
    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", address)
    if match is None:
        raise CheckpointError(
            "cannot be read", where=address, expected="hf://owner/name or hf://owner/name@revision"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    page = f"https://huggingface.co/{match[1]}"
    try:
        return Path(snapshot_download(match[1], revision=match[2], allow_patterns=_HUB_FILES))
    except GatedRepoError as error:
        raise CheckpointError(
            "these weights are gated: their owner gives access by hand to who asks for it there",
            where=page,
            remedy="when it is granted, log in with `hf auth login` or set HF_TOKEN, and run this again",
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            "no such model on the hub, or one that you may not see",
            where=address,
            remedy=f"look at {page}; log in with `hf auth login` or set HF_TOKEN",
        ) from error
    except Exception as error:  # the library lets its transport's and cache's errors through
        line = " ".join(str(error).split())[:160]
        raise FetchError(
            f"the hub did not deliver ({type(error).__name__}: {line})",
            where=address,
            remedy="try again later",
        ) from error
