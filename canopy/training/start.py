"""How a run begins: its folder is held, and weights come from a model, an encoder or an earlier run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from filelock import FileLock, Timeout
from torch import Tensor

from canopy.config import validate_settings
from canopy.errors import CheckpointError, ConfigError
from canopy.files import replacing, told_as_output
from canopy.models.checkpoint import BUFFERS, load_strict
from canopy.models.foreign import open_weights
from canopy.models.height import HeightModel
from canopy.models.pretrained import PretrainedEncoder, facts_of, metadata_of, open_encoder
from canopy.models.registry import resolve_model
from canopy.runtime import log
from canopy.training.optim import first_process
from canopy.training.settings import FinetuneSettings, PretrainSettings

S = TypeVar("S", FinetuneSettings, PretrainSettings)
CONFIG, LAST, LOCK = "config.yaml", "last.ckpt", ".lock"
# What a resumed run may change: how long, on what machine, how it is watched; the sides of views.
FREE = {
    "steps", "minutes", "threads", "device", "strategy", "log_every", "compile", "tensorboard", "workers",
    "patience", "checkpoint_every", "keep_every", "data.workers", "probe.every", "probe.labels",
    "probe.chips", "views.global_px", "views.local_px",  # DINOv2 ends on larger views
}  # fmt: skip
_FOLDERS = re.compile(r"(?<![^\s='\"])/(?:[^\s/'\"]+/)*(?=[^\s/'\"])")
_WEIGHTS = (".safetensors", ".ckpt")
_ENCODER = "encoder."
_LEAVE_OUT = "leave `model` out of the config, as canopy train tune does, or describe this very model"
_MODEL = "model."  # a HeightModel's weights in a run's checkpoint


# ---- the folder ---------------------------------------------------------------------------------------
@contextmanager
def held(folder: Path, settings: S, resume: bool) -> Iterator[None]:
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


def _write_settings(path: Path, settings: S, resume: bool) -> None:
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


# ---- weights ------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Start:
    """What a run begins from: an encoder, or all that `init_from` holds.

    Attributes:
        facts: for the card of what comes out: file, licence, source, ...
        encoder: of `model.encoder.init`.
        tensors: of `init_from`, by a HeightModel's names; path, said: its file and metadata.
    """

    facts: dict[str, Any]
    encoder: PretrainedEncoder | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    path: Path = Path()
    said: Mapping[str, str] = field(default_factory=dict)

    def load_into(self, model: HeightModel) -> None:
        """Load the weights into `model`, strictly: every tensor fits, or nothing is loaded.

        Raises:
            CheckpointError: keys and shapes that differ (they are named), or another normalisation.
        """
        if self.encoder is not None:
            self.encoder.load_into(model.encoder)
        else:
            _same_normalisation(model, self.said, self.path)
            found = {k: v for k, v in self.tensors.items() if k not in BUFFERS}
            if all(name.startswith(_ENCODER) for name in found):
                inside = {k.removeprefix(_ENCODER): v for k, v in found.items()}
                load_strict(model.encoder, inside, self.path)
            else:
                own = {k: v for k, v in model.state_dict().items() if k in BUFFERS}
                remedy = (
                    "leave `model` out of the config, as canopy train tune does, or describe this very model"
                )
                load_strict(model, {**found, **own}, self.path, remedy)
        log.info("weights of %s", self.facts["file"])


def begin_from(settings: S) -> tuple[S, Start | None]:
    """What a run of `settings` begins from, and the settings with the model's description that comes along.

    A whole model that `init_from` names brings its own; what the settings say of `model` stands above it. An
    encoder that `model.encoder.init` names brings its architecture and normalisation.

    Raises:
        CheckpointError, FetchError: no such weights, or damaged ones.
        ConfigError: the settings contradict the encoder.
    """
    name = settings.init_from if isinstance(settings, FinetuneSettings) else None
    if settings.encoder_init is not None:
        encoder = open_encoder(settings.encoder_init)
        return _described(settings, _of_encoder(settings, encoder)), Start(encoder.facts, encoder)
    if name is None:
        return settings, None
    path = Path(name) if Path(name).suffix in _WEIGHTS else resolve_model(name)
    tensors, said = read_weights(path), metadata_of(path)
    if not any(k.startswith(_ENCODER) for k in tensors):
        raise CheckpointError(
            "holds no encoder", where=path, expected="tensors named encoder.*",
            remedy="give it as model.encoder.init=" if "timm" in said else "name another file",
        )  # fmt: skip
    try:
        described = _described(settings, json.loads(said.get("config", "{}")))
    except ConfigError as error:
        raise ConfigError(
            f"the config's `model` is another network than {path.name} ({error.what})", remedy=_LEAVE_OUT
        ) from error
    return described, Start(facts_of(path, said), None, tensors, path, said)


def _described(settings: S, base: dict[str, Any]) -> S:
    raw = settings.model_dump() | {"model": _merged(base, settings.model)}
    return validate_settings(type(settings), raw, where="config")


def _merged(base: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings, what `above` has before what `base` has."""
    both = {
        k: _merged(base[k], v)
        for k, v in above.items()
        if isinstance(v, dict) and isinstance(base.get(k), dict)
    }
    return {**base, **above, **both}


def _of_encoder(settings: S, found: PretrainedEncoder) -> dict[str, Any]:
    """The model's description that an encoder brings; only its taps and stochastic depth can be chosen."""
    theirs = found.config.model_dump(mode="json")
    said = settings.model.get("encoder", {})
    other = [k for k, v in said.items() if k not in ("init", "taps", "drop_path") and v != theirs.get(k)]
    norms = {"mean": list(found.mean), "std": list(found.std)}
    other += [k for k, v in norms.items() if settings.model.get(k, v) != v]
    if other:
        raise ConfigError(
            f"model.encoder.init decides {', '.join(other)} itself",
            where=f"model of {settings.name}",
            remedy="leave these out, or take a config without them: canopy train outside",
        )
    return {"encoder": theirs, **norms}


def _same_normalisation(model: HeightModel, said: Mapping[str, str], path: Path) -> None:
    """A pretrained encoder says what its images were normalised with: other constants would shift them."""
    for name in ("mean", "std"):
        theirs, ours = json.loads(said.get(name, "null")), list(getattr(model.config, name))
        if theirs not in (None, ours):
            raise CheckpointError(
                f"was trained on images of {name} {theirs}, the model has {ours}",
                where=path,
                remedy=f"set model.{name} to what the encoder knows",
            )


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, or the averaged weights of a fine-tuning's checkpoint; in float32.

    Raises:
        CheckpointError: no such file, or damaged.
    """
    found = open_weights(path).tensors
    if path.suffix == ".ckpt":
        found = {k.removeprefix(_MODEL): v for k, v in found.items() if k.startswith(_MODEL)}
    return {k: v.float() if v.is_floating_point() else v for k, v in found.items()}


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
