"""The hub edition of v2: weights in the layout of the `transformers` package, and their config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from canopy.errors import CheckpointError, ConfigError
from canopy.models.config import DecoderConfig, ModelConfig
from canopy.models.foreign import ForeignFile, open_safetensors, open_shards
from canopy.models.published_sizes import MEAN, STD, config_v2

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
