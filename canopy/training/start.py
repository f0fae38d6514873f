"""How a run begins: its folder is held, and weights come from an encoder, a model or an earlier run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout
from pydantic import BaseModel
from torch import Tensor

from canopy.errors import CheckpointError, ConfigError
from canopy.files import replacing, told_as_output
from canopy.models.checkpoint import load_strict
from canopy.models.height import HeightModel
from canopy.runtime import log
from canopy.training.optim import first_process

CONFIG, LAST, LOCK = "config.yaml", "last.ckpt", ".lock"
# What a resumed run may change: how long, on what machine, how it is watched; the sides of views.
FREE = {
    "steps", "minutes", "threads", "device", "log_every", "compile", "tensorboard", "workers", "patience",
    "checkpoint_every", "keep_every", "data.workers", "probe.every", "probe.labels", "probe.chips",
    "views.global_px", "views.local_px",  # DINOv2 ends on larger views
}  # fmt: skip
_FOLDERS = re.compile(r"(?<![^\s='\"])/(?:[^\s/'\"]+/)*(?=[^\s/'\"])")
_ENCODER = "encoder."
_MODEL = "model."  # a HeightModel's weights in a run's checkpoint
_FIXED = ("mean", "std", "centres")  # buffers that the new run's own config decides
# What a classifier has behind its features, in timm's names.
_CLASSIFIER = ("classifier.", "head.", "fc.", "fc_norm.", "conv_head.", "bn2.", "norm.")


@contextmanager
def held(folder: Path, settings: BaseModel, resume: bool) -> Iterator[None]:
    """Hold RUN_DIR `folder` (created) for a run that starts or goes on in it; its settings go to config.yaml.

    Of several processes of one run the first holds it for all.

    Raises:
        ConfigError: there is a run and `resume` is off, there is none and it is on, settings changed, or
            another process trains there.
        OutputError: it cannot be written.
    """
    if not first_process():
        yield
        return
    _check_place(folder, resume)
    lock = FileLock(folder / LOCK, timeout=0)
    with told_as_output(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout as error:
            raise ConfigError(
                "another process trains here", where=folder, remedy="wait for it, or choose another folder"
            ) from error
    try:
        _check_place(folder, resume)  # again, for another process may just have begun or ended
        _write_settings(folder / CONFIG, settings, resume)
        yield
    finally:
        lock.release()


def _check_place(folder: Path, resume: bool) -> None:
    if resume != (folder / LAST).exists():
        raise ConfigError(
            "holds no run to resume" if resume else "holds a run already",
            where=folder,
            remedy="leave out --resume" if resume else "add --resume, or choose another folder",
        )


def _write_settings(path: Path, settings: BaseModel, resume: bool) -> None:
    now = json.loads(settings.model_dump_json())
    if resume and path.is_file():
        before, after = _flat(yaml.safe_load(path.read_text())), _flat(now)
        names = before.keys() | after.keys()
        changed = sorted(name for name in names - FREE if before.get(name) != after.get(name))
        if changed:
            raise ConfigError(
                f"the run was started with other settings: {', '.join(changed)}",
                where=path.parent,
                remedy="use the same config, or start a new run in another folder",
            )
    with replacing(path) as part:
        part.write_text(yaml.safe_dump(now, sort_keys=False))


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    out: dict[str, Any] = {}
    for name, value in settings.items():
        out |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return out


def without_folders(command: str) -> str:
    """A command as a card may show it: absolute paths by name alone, because folders are this machine's."""
    return _FOLDERS.sub("", command)


# ---- weights ----------------------------------------------------------------------------------------
def start_from(model: HeightModel, path: Path, part: str = "auto") -> None:
    """Load weights into `model`, strictly: every tensor of the part fits, or nothing is loaded.

    Args:
        model: changed in place.
        path: a safetensors file (a pretraining's `encoder.safetensors`, a model file, or a timm network in
            its own names, with `timm`, `mean` and `std` in the metadata), or a run's checkpoint (its averaged
            weights).
        part: 'encoder', or 'auto': all that the file has, whole encoder or whole model.

    Raises:
        CheckpointError: no such file, damaged, or keys and shapes that differ (they are named).
    """
    tensors, said = read_weights(path), _header(path)
    found = {k: v for k, v in tensors.items() if k not in _FIXED}
    inside = {k.removeprefix(_ENCODER): v for k, v in found.items() if k.startswith(_ENCODER)}
    if "timm" in said and not inside:
        inside, found = _in_our_names(model, tensors), {}
    if not inside:
        raise CheckpointError(
            "holds no encoder", where=path, expected="tensors named encoder.*", remedy="name another file"
        )
    _same_normalisation(model, said, path)
    if part == "encoder" or len(inside) >= len(found):
        load_strict(model.encoder, inside, path)
        log.info("encoder of %s: %d tensors", path.name, len(inside))
    else:
        own = {k: v for k, v in model.state_dict().items() if k in _FIXED}
        load_strict(model, {**found, **own}, path)
        log.info("%s: %d tensors", path.name, len(found))


def _in_our_names(model: HeightModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A timm network's weights as our encoder calls them, without the classifier that it does not have."""
    ours = model.encoder.state_dict()
    prefix = "net." if model.config.encoder.family == "cnn" else "vit."
    named = {f"{prefix}{k}": v for k, v in tensors.items()}
    return {k: v for k, v in named.items() if k in ours or not k.removeprefix(prefix).startswith(_CLASSIFIER)}


def _same_normalisation(model: HeightModel, said: dict[str, str], path: Path) -> None:
    """A pretrained encoder says what its images were normalised with: other constants would shift them."""
    for name in ("mean", "std"):
        if name not in said:
            continue
        theirs, ours = said[name], list(getattr(model.config, name))
        theirs = json.loads(theirs if theirs.startswith("[") else f"[{theirs}]")
        if theirs != ours:
            raise CheckpointError(
                f"was trained on images of {name} {theirs}, the model has {ours}",
                where=path,
                remedy=f"set model.{name} to what the encoder knows",
            )


def _header(path: Path) -> dict[str, str]:
    """Metadata of a safetensors file; a run's checkpoint has none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, in float32, or the averaged weights of a fine-tuning's checkpoint.

    Raises:
        CheckpointError: no such file, or damaged.
    """
    if not path.is_file():
        raise CheckpointError("no such file", where=path, expected="a safetensors file or a last.ckpt")
    if path.suffix == ".ckpt":
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        except Exception as error:  # damaged bytes make torch's reader stumble in a dozen ways
            raise CheckpointError(f"is no checkpoint of a run ({error})", where=path) from error
        return {k.removeprefix(_MODEL): v for k, v in state.items() if k.startswith(_MODEL)}
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"is damaged or no safetensors file ({error})", where=path) from error
    return {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}


@torch.no_grad()
def expect_heights(model: HeightModel, heights_m: Tensor) -> None:
    """Let a fresh model predict the distribution of `heights_m` (n,) everywhere, before it has seen anything.

    Fresh softmax bins are all alike, and their mean is half the highest bin: hundreds of steps would
    go into unlearning 25 m. So the last layer's bias becomes the logarithm of how often each bin is nearest.
    Other heads (weights 'relu') are left as they are.
    """
    config, last = model.config.decoder, model.decoder.head.conv3
    if config.weights != "softmax" or last.bias is None or not len(heights_m):
        return
    centres = model.centres.cpu() * config.scale
    edges = (centres[1:] + centres[:-1]) / 2
    counts = torch.bincount(torch.bucketize(heights_m.cpu(), edges), minlength=config.bins).float()
    share = (counts + 1e-3 * counts.sum()) / (1 + 1e-3 * config.bins) / counts.sum()
    last.bias.copy_(share.log() - share.log().mean())
    last.weight.mul_(0.1)  # or random scores would drown it


def describe_start(path: Path) -> dict[str, object]:
    """What a safetensors file says about itself, for the card of the model that starts from it."""
    said = _header(path)
    try:
        card = json.loads(said.get("card", "{}"))
    except ValueError:
        card = {}
    facts: dict[str, object] = {k: said[k] for k in ("timm", "licence", "source") if k in said}
    facts |= {k: v for k, v in card.items() if isinstance(v, (str, int, float))}
    return {"file": path.name, **facts}
