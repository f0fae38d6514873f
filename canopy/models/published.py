"""Published canopy-height checkpoints -> canopy's own file: recognised by content, converted exactly.

Four layouts are known: v1 plain and v1 quantised (one file each), v2 original (a backbone and a head file),
and v2 as the hub's `transformers` edition. See docs/published-models.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from canopy import __version__
from canopy.errors import CheckpointError, ConfigError
from canopy.files import check_output, file_sha256
from canopy.models.checkpoint import RUN_MODEL, write_model
from canopy.models.config import DecoderConfig, ModelConfig
from canopy.models.decoder import bin_centres
from canopy.models.height import HeightModel
from canopy.models.published_tables import (
    MEAN,
    STD,
    ForeignFile,
    config_v1,
    config_v2,
    key_bias_in_use,
    open_foreign,
    open_safetensors,
    open_shards,
    parts,
    read_given,
    unused,
)

_CONFIG, _PROCESSOR = "config.json", "preprocessor_config.json"
# What canopy's decoder does; another value would need other arithmetic.
_ONLY: dict[str, Any] = {
    "readout_type": "project",
    "bins_strategy": "chmv2_mixlog",
    "norm_strategy": "chmv2_mixlog",
    "reassemble_factors": [4, 2, 1, 0.5],
}
_ONLY_BACKBONE: dict[str, Any] = {
    "model_type": "dinov3_vit",
    "use_gated_mlp": False,
    "hidden_act": "gelu",
    "apply_layernorm": True,
    "num_channels": 3,
}


def open_directory(folder: Path) -> tuple[ForeignFile, dict[str, Any]]:
    """Weights and settings of a directory in the hub's layout.

    Returns:
        The tensors, and the settings as `settings_beside` gives them.

    Raises:
        CheckpointError: no weights there, or damaged ones.
    """
    index = folder / "model.safetensors.index.json"
    whole = folder / "model.safetensors"
    if index.is_file():
        file = open_shards(index)
    elif whole.is_file():
        file = open_safetensors(whole)
    else:
        raise CheckpointError(
            "holds no model.safetensors", where=folder, expected="a directory in the hub's layout"
        )
    return file, settings_beside(whole)


def settings_beside(weights: Path) -> dict[str, Any]:
    """config.json beside a weight file, with the processor's mean and std as `image_mean`, `image_std`.

    Empty where there is none, or where it belongs to something else.
    """
    settings = _read_json(weights.parent / _CONFIG)
    if settings.get("model_type") != "chmv2":
        return {}
    processor = _read_json(weights.parent / _PROCESSOR)
    return settings | {k: processor[k] for k in ("image_mean", "image_std") if k in processor}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot be read ({error})", where=path, remedy="download it again") from error
    return values if isinstance(values, dict) else {}


def config_hub(
    file: ForeignFile, settings: Mapping[str, Any], raw: Mapping[str, Any]
) -> tuple[str, ModelConfig]:
    """Name and config of a hub edition.

    Sizes come from the tensors; heads, taps, epsilon and scale from `settings` where there are some, else
    from the published size or from `raw` (the `--config` object, or a config.json of the hub's kind).

    Raises:
        CheckpointError: settings that canopy's decoder does not have, or a size that nothing explains.
        ConfigError: `raw` or the settings disagree with the tensors.
    """
    if raw.get("model_type") == "chmv2":
        settings, raw = {**settings, **raw}, {}
    backbone = settings.get("backbone_config") or {}
    _refuse_others(settings, _ONLY, "config.json")
    _refuse_others(backbone, _ONLY_BACKBONE, "config.json backbone_config")
    name, config = config_v2(_as_original(file), {**_given(settings, backbone), **raw})
    # The original files leave epsilon to the code; the hub edition states it (1e-6 unless it says otherwise).
    epsilon = float(backbone.get("layer_norm_eps", 1e-6))
    decoder: DecoderConfig = replace(
        config.decoder,
        bin_min=float(settings.get("min_depth", config.decoder.bin_min)),
        bin_max=float(settings.get("max_depth", 96.0)) / config.decoder.scale,
    )
    return name, replace(config, encoder=replace(config.encoder, norm_eps=epsilon), decoder=decoder)


def _refuse_others(values: Mapping[str, Any], only: Mapping[str, Any], where: str) -> None:
    for key, wanted in only.items():
        if values.get(key, wanted) != wanted:
            raise CheckpointError(
                f"{key} is {values[key]!r}", where=where, expected=f"{wanted!r}, all that canopy can run"
            )


def _given(settings: Mapping[str, Any], backbone: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in the words of `--config`."""
    stages = backbone.get("out_indices")
    if stages is not None and (len(stages) != 4 or min(stages) < 1):
        raise ConfigError(f"out_indices {stages}", where=_CONFIG, expected="four stages, counted from 1")
    said = {
        "embed_dim": backbone.get("hidden_size"),
        "depth": backbone.get("num_hidden_layers"),
        "num_heads": backbone.get("num_attention_heads"),
        "storage_tokens": backbone.get("num_register_tokens"),
        "patch_size": backbone.get("patch_size"),
        "rope_base": backbone.get("rope_theta"),
        # Stage 0 is the patch embedding; canopy counts blocks from 0.
        "taps": [stage - 1 for stage in stages] if stages else None,
        "post_process_channels": settings.get("post_process_channels"),
        "fusion_channels": settings.get("fusion_hidden_size"),
        "hidden_channels": settings.get("head_hidden_size"),
        "bins": settings.get("number_output_channels"),
        "mean": settings.get("image_mean", MEAN if settings else None),
        "std": settings.get("image_std", STD if settings else None),
    }
    return {key: value for key, value in said.items() if value is not None}


_RENAMED = (
    ("backbone.embeddings.cls_token", "cls_token"),
    ("backbone.embeddings.register_tokens", "storage_tokens"),
    ("backbone.embeddings.patch_embeddings.", "patch_embed.proj."),
    ("head.reassemble_stage.layers.", "reassemble_blocks.projects."),
    ("head.convs.", "convs."),
    ("head.fusion_layers.", "fusion_blocks."),
    ("head.conv_depth.", "conv_depth."),
    ("backbone.model.layer.", "blocks."),
    ("backbone.layer.", "blocks."),
)
_RENAMED_INSIDE = (
    (".projection.", ".conv."),
    (".mlp.up_proj.", ".mlp.fc1."),
    (".residual_layer1.convolution1.", ".res_conv_unit1.conv1.conv."),
)


def _as_original(file: ForeignFile) -> ForeignFile:
    """The few tensors that tell sizes, under the names of the original files."""
    tensors = {}
    for name, tensor in file.tensors.items():
        for theirs, original in _RENAMED:
            if name.startswith(theirs):
                name = original + name.removeprefix(theirs)
                break
        for theirs, original in _RENAMED_INSIDE:
            name = name.replace(theirs, original)
        if name.startswith("convs.") and not name.endswith(".conv.weight"):
            name = name.replace(".weight", ".conv.weight")
        tensors[name] = tensor
    return ForeignFile(file.paths, tensors, file.dropped, file.quantised)


_LICENCES = {"v1": "Apache-2.0", "v2": "DINOv3 License"}
_SOURCES = {
    "v1": "Tolan et al. 2024, HighResCanopyHeight (arXiv 2304.07213)",
    "v2": "Brandt et al. 2026, CHMv2 with DINOv3 (arXiv 2603.06382)",
}
# A tensor that only this kind of file has, and what to call the file.
_MARKS = (
    ("v1", "decode_head.reassemble_blocks.projects.0.conv.weight", "a v1 checkpoint"),
    ("v2-head", "reassemble_blocks.projects.0.conv.weight", "a v2 head"),
    ("v2-backbone", "storage_tokens", "a v2 (DINOv3) backbone"),
    ("hub", "head.reassemble_stage.layers.0.projection.weight", "a v2 hub edition"),
)
# What wrappers and data-parallel training put in front of every name.
_WRAPPERS = ("module.", "chm_module_.", "model.")
_BUFFERS = ("mean", "std", "centres")
_SHOWN = 8


@dataclass(frozen=True)
class Recognised:
    """A published model, understood but not yet read.

    Attributes:
        name: such as v1-huge; sizes that were never published are named by channels and blocks.
        found: what it is, in words.
        layout: 'v1', 'v2' or 'hub': whose names the tensors have.
        config: the model it becomes.
        file: its tensors.
        dropped: what of it the model does without, each with the reason.
    """

    name: str
    found: str
    layout: str
    config: ModelConfig
    file: ForeignFile
    dropped: dict[str, str]

    @property
    def release(self) -> str:
        return "v1" if self.layout == "v1" else "v2"


@dataclass(frozen=True)
class Converted:
    """A conversion that was done."""

    path: Path
    sha256: str
    recognised: Recognised
    card: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: what was found, what came out, what was left out and why."""
        config = self.recognised.config
        return {
            "output": str(self.path),
            "sha256": self.sha256,
            "bytes": self.path.stat().st_size,
            "name": self.recognised.name,
            "found": self.recognised.found,
            "gsd_m": config.gsd_m,
            "crop_px": config.crop_px,
            "licence": self.card["licence"],
            "inputs": self.card["inputs"],
            "tensors": len(self.recognised.file.tensors),
            "dropped": self.recognised.dropped,
            "config": config.to_dict(),
        }


def recognise(
    checkpoint: str | Path, *, backbone: str | Path | None = None, config: str | Path | None = None
) -> Recognised:
    """Find out by content which published model this is, and check every key and shape.

    Args:
        checkpoint: a file, or a directory in the hub's layout.
        backbone: the other file of a v2 original; the two may come in either order.
        config: a JSON file with what tensors of unusual size cannot tell (heads, taps, mean, std).

    Raises:
        CheckpointError: damaged, unsafe, unknown, incomplete, or not fitting its own architecture.
        ConfigError: `config` is unreadable or contradicts the tensors.
    """
    paths = [Path(path).expanduser() for path in (checkpoint, backbone) if path is not None]
    raw = read_given(Path(config).expanduser() if config is not None else None)
    if paths[0].is_dir():
        file, settings = open_directory(paths[0])
        kind, file = _kind(file)
    else:
        kind, file = _opened(paths)
        settings = settings_beside(paths[0])
    if len(paths) > 1 and kind != "v2":
        raise CheckpointError(
            f"is {_said(kind)}, whole in itself", where=paths[0], remedy="leave --backbone out"
        )
    if kind in ("v2-head", "v2-backbone"):
        other = "backbone" if kind == "v2-head" else "head"
        raise CheckpointError(
            f"is {_said(kind)} without its {other}",
            where=paths[0],
            remedy=f"give the {other} file with --backbone",
        )
    if kind == "hub":
        name, model_config = config_hub(file, settings, raw)
    else:
        name, model_config = (config_v1 if kind == "v1" else config_v2)(file, raw)
    if kind != "v1":
        encoder = model_config.encoder
        model_config = replace(model_config, encoder=replace(encoder, k_bias=key_bias_in_use(kind, file)))
    dropped = {**file.dropped, **_checked(kind, model_config, file)}
    return Recognised(name, _in_words(kind, name, file), kind, model_config, file, dropped)


def convert(
    checkpoint: str | Path,
    out: str | Path,
    *,
    backbone: str | Path | None = None,
    config: str | Path | None = None,
    source: str | None = None,
    half: bool = False,
    overwrite: bool = False,
) -> Converted:
    """Convert a published checkpoint; takes about three times the memory of its weights.

    Args:
        checkpoint, backbone, config: see `recognise`.
        out: the `.safetensors` file to write.
        source: where the checkpoint came from, for the card; the paper by default.
        half: store matrices as fp16, which halves the file; exact otherwise.
        overwrite: replace `out` if it exists.

    Raises:
        CheckpointError, ConfigError: see `recognise`.
        InputError: `out` exists.
        OutputError: it cannot be written.
    """
    (path,) = check_output(out, (checkpoint, backbone, config), overwrite=overwrite)
    recognised = recognise(checkpoint, backbone=backbone, config=config)
    card = _card(recognised, source)
    sha256 = write_model(path, _tensors(recognised), recognised.config, card, half=half)
    return Converted(path, sha256, recognised, card)


def _opened(paths: list[Path]) -> tuple[str, ForeignFile]:
    """Kind and tensors of one file, or of a head and a backbone put together."""
    opened = [_kind(open_foreign(path)) for path in paths]
    kinds = [kind for kind, _ in opened]
    if len(opened) == 1 or sorted(kinds) != ["v2-backbone", "v2-head"]:
        for (kind, _), path in zip(opened[1:], paths[1:], strict=True):
            if kinds[0] in ("v2-head", "v2-backbone"):
                raise CheckpointError(
                    f"is {_said(kind)}, and so is the other" if kind == kinds[0] else f"is {_said(kind)}",
                    where=path,
                    expected=f"the v2 {'backbone' if kinds[0] == 'v2-head' else 'head'}",
                )
        return opened[0]
    files = [file for _, file in opened]
    twice = sorted(set(files[0].tensors) & set(files[1].tensors))
    if twice:
        raise CheckpointError(f"{twice[0]} is in both files", where=files[0].where)
    return "v2", ForeignFile(
        tuple(paths),
        files[0].tensors | files[1].tensors,
        files[0].dropped | files[1].dropped,
        files[0].quantised + files[1].quantised,
    )


def _kind(file: ForeignFile) -> tuple[str, ForeignFile]:
    """What a file is, and its tensors without the prefix of a wrapper."""
    for prefix in ("", *_WRAPPERS):
        if prefix and not all(name.startswith(prefix) for name in file.tensors):
            continue
        for kind, mark, _ in _MARKS:
            if prefix + mark in file.tensors:
                return kind, file.without_prefix(prefix) if prefix else file
    some = ", ".join(sorted(file.tensors)[:3])
    hint = None
    if {"mean", "std", "centres"} <= set(file.tensors):
        hint = (
            "these are the weights of a canopy model: use the file that canopy wrote; to save changed ones "
            "use canopy.models.checkpoint.save_checkpoint"
        )
    elif any(name.startswith(("model.encoder.", "network.encoder.")) for name in file.tensors):
        hint = f"it is the state of a training run: use the run's {RUN_MODEL}"
    elif any(re.match(r"(encoder\.)?(layer\.|blocks\.)\d", name) for name in file.tensors):
        hint = "it may be a backbone without a canopy-height head"
    raise CheckpointError(
        f"is none of the published canopy-height models (it holds {some}, ...)",
        where=file.where,
        expected="; ".join(words for _, _, words in _MARKS),
        remedy=hint,
    )


def _said(kind: str) -> str:
    return next((words for name, _, words in _MARKS if name == kind), "a v2 model")


def _in_words(kind: str, name: str, file: ForeignFile) -> str:
    what = {
        "v1": "v1, plain",
        "v2": "v2, original backbone and head",
        "hub": "v2, hub edition (transformers layout)",
    }[kind]
    if file.quantised:
        what = f"v1, quantised ({file.quantised} layers of 8-bit integers, dequantised to fp32)"
    return f"{what}: {name}"


def _outline(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's parameters, without making them."""
    with torch.device("meta"):
        model = HeightModel(config)
    return {name: tuple(t.shape) for name, t in model.state_dict().items() if name not in _BUFFERS}


def _checked(layout: str, config: ModelConfig, file: ForeignFile) -> dict[str, str]:
    """Account for every key and shape; return the tensors that are not used, with reasons."""
    wanted: dict[str, tuple[int, ...]] = {}
    for part in parts(layout, _outline(config), file).values():
        wanted.update(part.sources)
    spare = {k: v for k, v in unused(layout, config.encoder.depth, file).items() if k not in wanted}
    known = file.tensors
    lines = [f"missing {k} {shape}" for k, shape in wanted.items() if k not in known]
    lines += [f"unexpected {k} {known[k].shape}" for k in known if k not in wanted and k not in spare]
    lines += [
        f"{k} is {known[k].shape}, expected {shape}"
        for k, shape in wanted.items()
        if k in known and known[k].shape != shape
    ]
    if lines:
        more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
        raise CheckpointError(
            f"is {_said(layout)} that does not fit its architecture ({len(lines)} differences): "
            + "; ".join(lines[:_SHOWN] + more),
            where=file.where,
        )
    return spare


def _tensors(recognised: Recognised) -> dict[str, Tensor]:
    config, file = recognised.config, recognised.file
    made = {
        name: part.combine(*(file.tensors[source].read() for source in part.sources))
        for name, part in parts(recognised.layout, _outline(config), file).items()
    }
    return made | {
        "mean": torch.tensor(config.mean).view(1, -1, 1, 1),
        "std": torch.tensor(config.std).view(1, -1, 1, 1),
        "centres": bin_centres(config.decoder),
    }


def _card(recognised: Recognised, source: str | None) -> dict[str, Any]:
    release = recognised.release
    reasons: dict[str, int] = {}
    for reason in recognised.dropped.values():
        reasons[reason] = reasons.get(reason, 0) + 1
    return {
        "name": recognised.name,
        "licence": _LICENCES[release],
        "source": source or _SOURCES[release],
        "paper": _SOURCES[release],
        "converted_from": recognised.found,
        "converted_by": f"canopy {__version__}",
        "inputs": [
            {"file": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}
            for path in recognised.file.paths
        ],
        "dropped": reasons,
        "percentiles": "5th and 95th of each band, from the published mean and std of a normal distribution",
    }
