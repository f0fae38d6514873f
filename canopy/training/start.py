"""Where the weights of a new run come from: a pretrained encoder, a model file, or an earlier run."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from canopy.errors import CheckpointError
from canopy.models.checkpoint import load_strict
from canopy.models.height import HeightModel
from canopy.runtime import log
from canopy.training.run_folder import without_folders

ENCODER = "encoder."
_FIXED = ("mean", "std", "centres")  # buffers that the new run's own config decides


def start_from(model: HeightModel, path: Path, part: str = "auto") -> str:
    """Load weights into `model`, strictly: every tensor of the part fits, or nothing is loaded.

    Args:
        model: changed in place.
        path: a safetensors file (a pretraining's `encoder.safetensors`, or a model file), or a run's
            `last.ckpt` (its averaged weights).
        part: 'encoder', 'all', or 'auto': all that the file has, whole encoder or whole model.

    Returns:
        'encoder' or 'all', what was loaded.

    Raises:
        CheckpointError: no such file, damaged, or keys and shapes that differ (they are named).
    """
    found = {k: v for k, v in _read(path).items() if k not in _FIXED}
    inside = {k: v for k, v in found.items() if k.startswith(ENCODER)}
    if not inside:
        raise CheckpointError(
            "holds no encoder", where=path, expected="tensors named encoder.*", remedy="name another file"
        )
    if part == "auto":
        part = "encoder" if len(inside) == len(found) else "all"
    _same_normalisation(model, path)
    if part == "encoder":
        load_strict(model.encoder, {k.removeprefix(ENCODER): v for k, v in inside.items()}, path)
    else:
        own = {k: v for k, v in model.state_dict().items() if k in _FIXED}
        load_strict(model, {**found, **own}, path)
    log.info("%s of %s: %d tensors", "encoder" if part == "encoder" else "all", path.name, len(inside))
    return part


def _same_normalisation(model: HeightModel, path: Path) -> None:
    """A pretrained encoder says what its images were normalised with: other constants would shift them."""
    said = _header(path)
    for name in ("mean", "std"):
        theirs, ours = json.loads(said.get(name, "null")), list(getattr(model.config, name))
        if theirs is not None and theirs != ours:
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


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError("no such file", where=path, expected="a safetensors file or a last.ckpt")
    if path.suffix == ".ckpt":
        return _read_run(path)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"is damaged or no safetensors file ({error})", where=path) from error
    return {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}


def _read_run(path: Path) -> dict[str, Tensor]:
    """The averaged weights of a fine-tuning run."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    except Exception as error:  # damaged bytes make torch's reader stumble in a dozen ways
        raise CheckpointError(f"is no checkpoint of a run ({error})", where=path) from error
    return {k.removeprefix("ema."): v for k, v in state.items() if k.startswith("ema.")}


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
    try:
        card = json.loads(_header(path).get("card", "{}"))
    except ValueError:
        card = {}
    card = {k: v for k, v in card.items() if isinstance(v, (str, int, float))}
    if "command" in card:
        card["command"] = without_folders(str(card["command"]))
    return {"file": path.name, **card}
