"""From a model's name, file, folder or `hf://` address to a loaded model; the table of published models.

Published models are downloaded at first use, checked, converted once, and kept by the sha256 of what they
were converted from.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from pydantic import Field, model_validator

from canopy.config import Settings, load_settings
from canopy.errors import CheckpointError, DataError, FetchError
from canopy.files import file_sha256, replacing
from canopy.models import checkpoint
from canopy.runtime import cache_dir, log, manifests_dir

if TYPE_CHECKING:
    import torch

    from canopy.models.height import HeightModel


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


# Raise when a conversion would come out differently: older results in caches are then left alone.
_CONVERTER = 1
_HUB = "hf://"
_HUB_FILES = [
    "config.json",
    "preprocessor_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
]


def load_model(name_or_path: str | Path = "default", device: str | torch.device = "cpu") -> HeightModel:
    """Load a model by name ('default', 'v1-huge', 'v2', ...) or from a file, in eval mode on `device`.

    Args:
        name_or_path: an embedded or a published name, a canopy file, an original v1 or v2 checkpoint, a
            directory of the hub's layout, or `hf://owner/name`.
        device: where to put it.

    Returns:
        A HeightModel: float RGB (B, 3, H, W) in 0..1 -> metres (B, 1, H, W); with `.card` and `.sha256`.

    Raises:
        CheckpointError: nothing of that name, or a file that cannot be used.
        FetchError: a published model could not be downloaded.
    """
    from canopy.models.checkpoint import load_model as load_file

    return load_file(resolve_model(name_or_path), device)


def resolve_model(name_or_path: str | Path) -> Path:
    """A canopy model file for a name, a file or an `hf://` address; errors as `load_model`."""
    name = str(name_or_path)
    if name in checkpoint.EMBEDDED:
        return checkpoint.resolve_model(name)
    if name.startswith(_HUB):
        return converted(fetch_hub(name), source=name)
    path = Path(name).expanduser()
    if path.is_dir():
        trained = path / checkpoint.RUN_MODEL
        return trained if trained.is_file() and is_canopy_file(trained) else converted(path)
    if path.suffix == ".ckpt" and path.is_file():
        raise checkpoint.pickle_error(path)
    if path.is_file():
        return path if is_canopy_file(path) else converted(path)
    table = published_models()
    if name in table:
        return _published(name, table[name])
    known = [*checkpoint.EMBEDDED, *table]
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.6)
    raise CheckpointError(
        f"no model {name!r}" + (f": did you mean {close[0]!r}?" if close else ""),
        expected=f"a file, hf://owner/name, or one of: {', '.join(known)}",
    )


def is_canopy_file(path: Path) -> bool:
    """Whether a file says that canopy wrote it; also true of one too short to say anything."""
    with path.open("rb") as file:
        first = file.read(8)
        size = int.from_bytes(first, "little")
        if len(first) < 8 or size > 100_000_000:
            return len(first) < 8
        header = file.read(size)
    return f'"format":"{checkpoint.FORMAT}"'.encode() in header.replace(b": ", b":") or len(header) < size


def converted(checkpoint: Path, *, backbone: Path | None = None, source: str | None = None) -> Path:
    """The cached conversion of an original checkpoint, made now if there is none.

    Raises:
        CheckpointError: it is none of the published kinds, or needs options of `canopy models convert`.
    """
    inputs = [path for path in (checkpoint, backbone) if path is not None]
    target = _conversion_path([_digest(path) for path in inputs])
    if target.is_file():
        return target
    from canopy.models.published import convert

    log.info(f"converting {checkpoint.name} once, into {target.parent}")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        result = convert(checkpoint, target, backbone=backbone, source=source, overwrite=True)
    except CheckpointError as error:
        if error.remedy is None or "--" not in error.remedy:
            raise
        raise CheckpointError(
            error.what,
            where=error.where,
            expected=error.expected,
            remedy=f"convert it first with canopy models convert: {error.remedy}",
        ) from error
    log.info(f"found {result.recognised.found}; licence {result.card['licence']}")
    return target


def _conversion_path(digests: list[str]) -> Path:
    key = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    return cache_dir() / "models" / "converted" / f"{key}-{_CONVERTER}.safetensors"


def _digest(path: Path) -> str:
    """sha256 of a file, or of the names and contents of a model directory."""
    if path.is_file():
        return file_sha256(path)
    names = [p for p in sorted(path.iterdir()) if p.suffix in (".json", ".safetensors") and p.is_file()]
    if not names:
        raise CheckpointError(
            "holds no model.safetensors",
            where=path,
            expected="a model file, or a directory of the hub's kind",
        )
    joined = "".join(f"{p.name}:{file_sha256(p)};" for p in names)
    return hashlib.sha256(joined.encode()).hexdigest()


def _published(name: str, entry: PublishedModel) -> Path:
    """The converted file of a published model, downloaded and converted at first use."""
    folder = cache_dir() / "models" / name
    pins = _read_pins(folder)
    if entry.origin in pins:
        target = _conversion_path(pins[entry.origin].split("+"))
        if target.is_file():
            return target
    log.warning(
        f"{name}: {entry.title}; about {entry.size_gb:g} GB from {entry.origin}; "
        f"licence: {entry.licence}; kept in {cache_dir() / 'models'}"
    )
    if entry.hub:
        snapshot = fetch_hub(entry.hub, entry.terms_at)
        target = converted(snapshot, source=entry.hub)
        _write_pins(folder, pins | {entry.origin: _digest(snapshot)})
        return target
    paths = [_download(file, folder, pins, entry) for file in entry.files]
    digests = [file_sha256(path) for path in paths]
    pins |= {file.url: digest for file, digest in zip(entry.files, digests, strict=True)}
    # Pinned before it is converted: a file that turns out to be no model is still the one that was served.
    _write_pins(folder, pins | {entry.origin: "+".join(digests)})
    return converted(paths[0], backbone=paths[1] if len(paths) > 1 else None, source=entry.origin)


def _download(file: WeightFile, folder: Path, pins: dict[str, str], entry: PublishedModel) -> Path:
    from canopy.download import download

    target = folder / Path(unquote(urlsplit(file.url).path)).name
    expected = file.sha256 or pins.get(file.url, "").split("+")[0] or None
    if target.is_file() and expected is not None and file_sha256(target) != expected:
        target.unlink()  # a leftover of another table or of a broken disk
    try:
        download(file.url, target, sha256=expected)
    except FetchError as error:
        if entry.terms_at is None or not re.search(r"\((401|403)\)", error.what):
            raise
        raise _gated(entry.terms_at) from error
    if file.bytes is not None and target.stat().st_size != file.bytes:
        size = target.stat().st_size
        target.unlink()
        raise DataError(
            f"has {size} bytes", where=file.url, expected=f"{file.bytes}", remedy="the download was discarded"
        )
    return target


def _gated(page: str) -> CheckpointError:
    return CheckpointError(
        "these weights are gated: their owner asks you to accept the terms first",
        where=page,
        remedy="accept them there, then log in with `hf auth login` or set HF_TOKEN, and run this again",
    )


def fetch_hub(address: str, terms_at: str | None = None) -> Path:
    """Download a model directory from the Hugging Face hub (resumed, cached and authorised by its library).

    Args:
        address: `hf://owner/name` or `hf://owner/name@revision`.
        terms_at: page to point to where access is refused; the model's own by default.

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
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    page = terms_at or f"https://huggingface.co/{match[1]}"
    try:
        return Path(snapshot_download(match[1], revision=match[2], allow_patterns=_HUB_FILES))
    except GatedRepoError as error:
        raise _gated(page) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            "no such model on the hub, or one that you may not see",
            where=address,
            remedy=f"look at {page}; log in with `hf auth login` or set HF_TOKEN",
        ) from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise _gated(page) from error
        raise FetchError(f"the hub answered {status}", where=address, remedy="try again later") from error
    except Exception as error:  # the library lets its transport's and cache's errors through
        line = " ".join(str(error).split())[:160]
        raise FetchError(
            f"the hub did not deliver ({type(error).__name__}: {line})",
            where=address,
            remedy="try again later",
        ) from error


def _read_pins(folder: Path) -> dict[str, str]:
    """Origin -> sha256 of what was first downloaded from it (several joined by +)."""
    path = folder / "pins.json"
    if not path.is_file():
        return {}
    try:
        return {str(k): str(v) for k, v in json.loads(path.read_text()).items()}
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(
            "cannot be read", where=path, remedy="remove it to trust the next download"
        ) from error


def _write_pins(folder: Path, pins: dict[str, str]) -> None:
    with replacing(folder / "pins.json") as part:
        folder.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(pins, indent=2))
