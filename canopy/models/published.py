"""Published canopy-height checkpoints -> canopy's own file: recognised by content, converted exactly.

All tensors are first given the names of the original v2 files, from which v1's differ by prefixes alone;
sizes are read from their shapes. Every parameter of the model then asks for its tensor by name, and whatever
else the files hold must be known to be of no use. Tables: published.yaml; more: docs/published-models.md.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from canopy import __version__
from canopy.config import Settings, validate_settings
from canopy.errors import CheckpointError, ConfigError
from canopy.files import check_output, file_sha256
from canopy.models.checkpoint import BUFFERS, differences, write_model
from canopy.models.config import ModelConfig
from canopy.models.decoder import bin_centres
from canopy.models.foreign import as_original, open_published, renamed, tables, weight_file
from canopy.models.height import HeightModel, normal_percentiles

_MEAN, _STD = (0.420, 0.411, 0.296), (0.213, 0.156, 0.143)
# Both decoders stretch token grids with an odd side; 32 px are two tokens.
_MULTIPLE_PX = 32


class Given(Settings):
    """`--config FILE.json`: what tensors of unusual size cannot tell. Repeated sizes must agree."""

    num_heads: int | None = None
    taps: tuple[int, ...] | None = None
    mean: tuple[float, float, float] = _MEAN
    std: tuple[float, float, float] = _STD
    gsd_m: float | None = None
    crop_px: int | None = None
    norm_eps: float | None = None
    min_depth: float | None = None
    max_depth: float | None = None
    rope_base: float = 100.0
    rope_rescale_coords: float | None = None  # a training-time augmentation: without effect here
    embed_dim: int | None = None
    depth: int | None = None
    patch_size: int | None = None
    storage_tokens: int | None = None
    post_process_channels: tuple[int, ...] | None = None
    fusion_channels: int | None = None
    hidden_channels: int | None = None
    bins: int | None = None


@dataclass(frozen=True)
class Recognised:
    """A published model, understood but not yet converted.

    Attributes:
        name: such as v1-huge; sizes that were never published are named by channels and blocks.
        found: what it is, in words.
        release: 'v1' or 'v2'.
        config: the model it becomes.
        tensors: the model's parameters, as the files store them.
        dropped: what of the files the model does without, each with the reason.
        count: tensors in the files.
    """

    name: str
    found: str
    release: str
    config: ModelConfig
    tensors: dict[str, Tensor]
    dropped: dict[str, str]
    count: int


def convert(
    checkpoint: str | Path,
    out: str | Path,
    *,
    backbone: str | Path | None = None,
    config: str | Path | None = None,
    source: str | None = None,
    half: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Convert a published checkpoint, one tensor at a time.

    Args:
        checkpoint, backbone, config: see `recognise`.
        out: the `.safetensors` file to write.
        source: where the checkpoint came from, for the card; the paper by default.
        half: store matrices as fp16, which halves the file; exact otherwise.
        overwrite: replace `out` if it exists.

    Returns:
        JSON-ready: what was found, what came out, what was left out and why.

    Raises:
        CheckpointError, ConfigError: see `recognise`.
        InputError: `out` exists.
        OutputError: it cannot be written.
    """
    (path,) = check_output(out, (checkpoint, backbone, config), overwrite=overwrite)
    found = recognise(checkpoint, backbone=backbone, config=config)
    release = tables()["releases"][found.release]
    shared = {
        "name": found.name,
        "licence": release["licence"],
        "source": source or release["source"],
        "inputs": [
            {"file": file.name, "bytes": file.stat().st_size, "sha256": file_sha256(file)}
            for file in (weight_file(Path(one).expanduser()) for one in (checkpoint, backbone) if one)
        ],
    }
    card = shared | {
        "paper": release["source"],
        "converted_from": found.found,
        "converted_by": f"canopy {__version__}",
        "dropped": dict(Counter(found.dropped.values())),
        "percentiles": "5th and 95th of each band, from the published mean and std of a normal distribution",
    }
    tensors = found.tensors | {
        "mean": torch.tensor(found.config.mean).view(1, -1, 1, 1),
        "std": torch.tensor(found.config.std).view(1, -1, 1, 1),
        "centres": bin_centres(found.config.decoder),
    }
    sha256 = write_model(path, tensors, found.config, card, half=half)
    return shared | {
        "output": str(path),
        "sha256": sha256,
        "bytes": path.stat().st_size,
        "found": found.found,
        "gsd_m": found.config.gsd_m,
        "crop_px": found.config.crop_px,
        "tensors": found.count,
        "dropped": found.dropped,
        "config": found.config.to_dict(),
    }


def recognise(
    checkpoint: str | Path, *, backbone: str | Path | None = None, config: str | Path | None = None
) -> Recognised:
    """Find out by content which published model this is, and account for every key and shape.

    Args:
        checkpoint: a file, or a directory in the hub's layout.
        backbone: the other file of a v2 original; the two may come in either order.
        config: a JSON file with what tensors of unusual size cannot tell (heads, taps, mean, std).

    Raises:
        CheckpointError: damaged, unsafe, unknown, incomplete, or not fitting its own architecture.
        ConfigError: `config` is unreadable or contradicts the tensors.
    """
    paths = [Path(path).expanduser() for path in (checkpoint, backbone) if path is not None]
    where = ", ".join(map(str, paths))
    layout, weights = open_published(paths)
    tensors, names = as_original(layout, weights.tensors)
    dropped = dict(weights.dropped)
    for name in [name for name in tensors if name.endswith(".bias_mask")]:
        mask, bias = tensors.pop(name), name.removesuffix("_mask")
        # The bias that acts: zero where the mask is zero, whatever the file holds there (it may be NaN).
        if bias in tensors:
            tensors[bias] = torch.where(mask == 0, torch.zeros_like(mask), tensors[bias] * mask)
        dropped[names.pop(name)] = "applied to the bias"
    release = "v1" if layout == "v1" else "v2"
    raw = {} if config is None else _read_json(Path(config).expanduser())
    given = _hub_given(paths[0], raw) if layout == "hub" else validate_settings(Given, raw, where="--config")
    name, model_config = _config(release, tensors, given, where)
    made, more = _assemble(model_config, tensors, names, f"a {release} model", where)
    what = {
        "v1": "v1, plain",
        "v2": "v2, original backbone and head",
        "hub": "v2, hub edition (transformers layout)",
    }[layout]
    if weights.quantised:
        what = f"v1, quantised ({weights.quantised} layers of 8-bit integers, dequantised to fp32)"
    found = f"{what}: {name}"
    return Recognised(name, found, release, model_config, made, dropped | more, len(weights.tensors))


# ---- its configuration ------------------------------------------------------------------------------------
def _hub_given(checkpoint: Path, raw: dict[str, Any]) -> Given:
    """What a hub edition's config.json says, which may itself be `--config`, or what `--config` says else.

    Raises:
        CheckpointError: settings that would need other arithmetic. ConfigError: settings that make no sense.
    """
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    settings = _read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if settings.get("model_type") != "chmv2":
        settings = {}  # of something else
    elif (folder / "preprocessor_config.json").is_file():
        settings |= _read_json(folder / "preprocessor_config.json")
    if raw.get("model_type") == "chmv2":
        settings, raw = settings | raw, {}
    backbone, table = settings.get("backbone_config") or {}, tables()["hub"]
    # The original files leave epsilon to the code; this edition states it, and 1e-6 is its default.
    said: dict[str, Any] = {"norm_eps": 1e-6}
    for part, values in (("settings", settings), ("backbone", backbone)):
        for key, wanted in table["only"][part].items():
            if values.get(key, wanted) != wanted:
                raise CheckpointError(
                    f"{key} is {values[key]!r}", where="config.json",
                    expected=f"{wanted!r}, all that canopy can run",
                )  # fmt: skip
        said |= {new: values[key] for key, new in table["words"][part].items() if values.get(key) is not None}
    stages = backbone.get("out_indices")
    if stages is not None:
        if len(stages) != 4 or min(stages) < 1:
            raise ConfigError(f"out_indices {stages}", where="config.json", expected="four stages, from 1")
        said["taps"] = [stage - 1 for stage in stages]  # stage 0 is the patch embedding
    return validate_settings(Given, said | raw, where="--config")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot be read ({error})", where=path, expected="a JSON object") from error
    if not isinstance(values, dict):
        raise ConfigError(f"holds a {type(values).__name__}", where=path, expected="a JSON object")
    return values


def _config(release: str, tensors: Mapping[str, Tensor], given: Given, where: str) -> tuple[str, ModelConfig]:
    """Name and config: sizes from the tensors; heads and taps from the published sizes or from `given`.

    Raises:
        CheckpointError: a size that is not published and whose heads or taps `given` does not have.
        ConfigError: `given` disagrees with the tensors.
    """
    shared, sizes = tables()["releases"][release], _sizes(tensors, release, where)
    for name, found in sizes.items():
        if getattr(given, name, None) not in (None, found):
            raise ConfigError(
                f"{name} is {getattr(given, name)}, but the tensors have {found}", where="--config"
            )
    patch = sizes["patch_size"]
    name, encoder = _encoder(release, sizes, tensors, given, where)
    decoder = shared["decoder"] | {
        "post_channels": sizes["post_process_channels"], "fusion": sizes["fusion_channels"],
        "hidden": sizes["hidden_channels"], "bins": sizes["bins"],
        "project_after_fusion": "project.conv.weight" in tensors,
        "unit_bias": "fusion_blocks.1.res_conv_unit1.conv1.conv.bias" in tensors,
    }  # fmt: skip
    if given.min_depth is not None:
        decoder["bin_min"] = given.min_depth
    if given.max_depth is not None:
        decoder["bin_max"] = given.max_depth / decoder["scale"]
    values = shared["model"] | {
        "encoder": encoder, "decoder": decoder, "mean": given.mean, "std": given.std,
        "multiple_px": max(_MULTIPLE_PX, 2 * patch),
        "percentiles": normal_percentiles(given.mean, given.std),
    }  # fmt: skip
    values |= {key: getattr(given, key) for key in ("gsd_m", "crop_px") if getattr(given, key)}
    return name, ModelConfig.from_dict(values)


def _encoder(
    release: str, sizes: Mapping[str, Any], tensors: Mapping[str, Tensor], given: Given, where: str
) -> tuple[str, dict[str, Any]]:
    """Name of the model, and settings of its encoder; errors as `_config`."""
    shared, periods = tables()["releases"][release], tensors.get("rope_embed.periods")
    dim, depth = sizes["embed_dim"], sizes["depth"]
    # Four channels of a head share a rotary period, so the periods tell the heads.
    told = dim // (4 * periods.numel()) if periods is not None else None
    name, heads, taps = shared["sizes"].get(f"{dim}x{depth}", (f"{release}-{dim}x{depth}", told, None))
    heads, taps = given.num_heads or heads, given.taps or taps
    if not heads or not taps:
        raise CheckpointError(
            f"a {release} model of {dim} channels and {depth} blocks is not a published size, and its "
            "tensors do not tell its attention heads and taps",
            where=where,
            remedy='use canopy models convert with --config FILE.json that has "num_heads" and "taps"',
        )
    if max(taps) >= depth:
        raise ConfigError(f"taps {list(taps)} in {depth} blocks", where="--config")
    encoder = shared["encoder"] | {
        "dim": dim, "patch": sizes["patch_size"], "registers": sizes["storage_tokens"], "heads": heads,
        "taps": taps, "mlp_ratio": sizes["mlp"] / dim,
        "depth": max(taps) + 1,  # blocks behind the last tap are never run
    }  # fmt: skip
    if given.norm_eps is not None:
        encoder["norm_eps"] = given.norm_eps
    if release == "v1":
        return name, encoder | {"pos_grid": math.isqrt(sizes["positions"] - 1)}
    biases = [t.chunk(3)[1] for n, t in tensors.items() if n.endswith(".attn.qkv.bias")]
    encoder |= {"k_bias": any(bool(b.any()) for b in biases), "rope_temperature": given.rope_base}
    if periods is not None:
        computed = given.rope_base ** (torch.arange(periods.numel(), dtype=torch.float32) / periods.numel())
        if not torch.allclose(periods.float(), computed, rtol=1e-6, atol=0.0):
            encoder["rope_periods"] = periods.tolist()  # some files store them rounded to bfloat16
    return name, encoder


def _sizes(tensors: Mapping[str, Tensor], release: str, where: str) -> dict[str, Any]:
    """Sizes by their names in `--config`, and the widths of MLPs and position table."""

    def size(name: str, axis: int = 0) -> int:
        if name not in tensors or tensors[name].ndim <= axis:
            raise CheckpointError(f"missing {name}", where=where, expected="a whole checkpoint")
        return int(tensors[name].shape[axis])

    return {
        "embed_dim": size("patch_embed.proj.weight"),
        "patch_size": size("patch_embed.proj.weight", 2),
        "depth": len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
        "mlp": size("blocks.0.mlp.fc1.weight"),
        "positions": size("pos_embed", 1) if release == "v1" else 0,
        "storage_tokens": size("storage_tokens", 1) if release == "v2" else 0,
        "post_process_channels": tuple(size(f"reassemble_blocks.projects.{i}.conv.weight") for i in range(4)),
        "fusion_channels": size("convs.0.conv.weight"),
        "hidden_channels": size("conv_depth.head.2.weight"),
        "bins": size("conv_depth.head.4.weight"),
    }


# ---- its tensors ------------------------------------------------------------------------------------------
def _assemble(
    config: ModelConfig, tensors: Mapping[str, Tensor], names: Mapping[str, str], what: str, where: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Our parameters, and by the files' own names what they are not made of, each with the reason.

    Raises:
        CheckpointError: a key or shape that is not accounted for.
    """
    with torch.device("meta"):
        outline = {k: t for k, t in HeightModel(config).state_dict().items() if k not in BUFFERS}
    origins, wanted = {}, {}
    for ours, like in outline.items():
        theirs = renamed(ours, tables()["from_ours"])
        third = re.search(r"\.attn\.([qkv])_bias$", ours)  # the files have the three in one
        origins[ours] = theirs, "qkv".index(third[1]) if third else None
        wanted[theirs] = (3 * like.shape[0],) if third else tuple(like.shape)
    reasons = {}
    for name in tensors.keys() - wanted.keys():
        block = re.match(r"blocks\.(\d+)\.", name)
        if block and int(block[1]) >= config.encoder.depth:
            reasons[name] = "never run: behind the last tapped block"
        for pattern, reason in tables()["unused"]:
            if re.match(pattern, name):
                reasons[name] = reason
    found = {names.get(k, k): tuple(t.shape) for k, t in tensors.items() if k not in reasons}
    wrong = differences({names.get(k, k): shape for k, shape in wanted.items()}, found)
    if wrong:
        raise CheckpointError(f"is {what} that does not fit its architecture ({wrong})", where=where)
    made = {
        ours: tensors[name] if part is None else tensors[name].chunk(3)[part]
        for ours, (name, part) in origins.items()
    }
    return made, {names[name]: reasons[name] for name in sorted(reasons)}
