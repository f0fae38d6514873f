"""Encoders that others pretrained: found by timm's name, as a file or folder, or on the hub.

timm says how a network of a name is built; the file's tensors, in timm's names, must then fit it exactly.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import RotaryEmbeddingDinoV3
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from canopy.errors import CheckpointError
from canopy.models.checkpoint import load_strict
from canopy.models.config import CNN_PATCH_PX, EncoderConfig
from canopy.models.encoder import CnnEncoder, Encoder
from canopy.models.foreign import open_weights, weight_file
from canopy.models.registry import fetch_hub

# For `canopy models list --encoders`; any other of timm's names that is built alike is taken as well.
LISTED = (
    "tf_efficientnet_lite2.in1k", "resnet34.a1_in1k",
    "vit_small_patch14_dinov2.lvd142m", "vit_small_patch14_reg4_dinov2.lvd142m",
    "vit_base_patch14_reg4_dinov2.lvd142m", "vit_small_patch16_dinov3.lvd1689m",
    "vit_base_patch16_dinov3.lvd1689m", "vit_large_patch16_dinov3.sat493m",
)  # fmt: skip
_OURS = "encoder."
_TOLD = ("name", "objective", "licence", "source", "date")
# What a classifier has behind its features, in timm's names.
_CLASSIFIER = ("classifier.", "head.", "fc.", "fc_norm.", "conv_head.", "bn2.", "norm.", "mask_token")


@dataclass(frozen=True)
class PretrainedEncoder:
    """An encoder's file and what it says of itself.

    Attributes:
        path: of the tensors.
        config: how it is built; its taps are the last blocks of the four quarters.
        mean, std: what its images were normalised with, in 0..1; empty where it does not say.
        facts: for a model's card: file, timm, licence, source.
    """

    path: Path
    config: EncoderConfig
    mean: tuple[float, ...]
    std: tuple[float, ...]
    facts: dict[str, Any]

    def load_into(self, encoder: Encoder | CnnEncoder) -> None:
        """Load the weights, strictly: every tensor fits, or nothing is loaded. Raises CheckpointError."""
        found = open_weights(self.path).tensors
        tensors = {k: v.float() if v.is_floating_point() else v for k, v in found.items()}
        inside = {k.removeprefix(_OURS): v for k, v in tensors.items() if k.startswith(_OURS)}
        if inside:
            load_strict(encoder, inside, self.path)
            return
        ours = encoder.state_dict()
        prefix = "net." if isinstance(encoder, CnnEncoder) else "vit."
        named = {f"{prefix}{k}": v for k, v in tensors.items()}
        behind = tuple(prefix + part for part in _CLASSIFIER)
        load_strict(
            encoder, {k: v for k, v in named.items() if k in ours or not k.startswith(behind)}, self.path
        )


def open_encoder(name: str) -> PretrainedEncoder:
    """The encoder that a name stands for; from the hub at first use.

    Args:
        name: timm's, with or without tag (`vit_small_patch14_dinov2`), `hf://owner/name`, a folder in timm's
            layout of the hub (config.json, model.safetensors), a safetensors file whose metadata have `timm`,
            the name, and perhaps `mean`, `std`, `licence` and `source`; or the encoder of `canopy pretrain`
            or of a model file of canopy's own.

    Raises:
        CheckpointError: no such thing, it does not say what it is, or it is built unlike this project's.
        FetchError: the hub did not deliver.
    """
    path, where = Path(name).expanduser(), name
    if not path.exists() and not name.startswith("hf://"):
        where = f"hf://{_known(name)['hf_hub_id']}"
    if not path.exists():
        path = fetch_hub(where)
    said = _said(path)
    if "encoder" in said or "config" in said:  # our own
        config = json.loads(said.get("config") or "{}") or {**said, "encoder": json.loads(said["encoder"])}
        mean, std = tuple(config["mean"]), tuple(config["std"])
        return PretrainedEncoder(path, EncoderConfig(**config["encoder"]), mean, std, facts_of(path, said))
    if "timm" not in said:
        raise CheckpointError(
            "does not say which of timm's networks it is", where=name,
            expected="safetensors metadata `timm`, or config.json with `architecture`",
            remedy="name a file of timm's, or of canopy's own",
        )  # fmt: skip
    known = _known(said["timm"]) | {k: v for k, v in said.items() if v}
    facts = {"file": path.name if path.is_file() else where.rstrip("/").split("/")[-1], "timm": said["timm"]}
    facts["licence"] = known.get("licence") or known.get("license") or "not stated"
    facts["source"] = said.get("source") or (where if where.startswith("hf://") else "not stated")
    mean, std = (tuple(float(v) for v in known[k]) for k in ("mean", "std"))
    return PretrainedEncoder(weight_file(path), _config_of(said["timm"]), mean, std, facts)


def listed_encoders() -> list[dict[str, Any]]:
    """Name, licence, hub address and normalisation of `LISTED`, as timm tells them; nothing is fetched."""
    rows = [(name, _known(name)) for name in LISTED]
    return [
        {"name": name, "licence": cfg["license"] or "not stated", "source": f"hf://{cfg['hf_hub_id']}",
         "mean": list(cfg["mean"]), "std": list(cfg["std"])}
        for name, cfg in rows
    ]  # fmt: skip


def _known(name: str) -> dict[str, Any]:
    """What timm knows of a network: architecture, hf_hub_id, mean, std, license."""
    found = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if found is None or not found.hf_hub_id:
        close = difflib.get_close_matches(name, timm.list_pretrained(), n=1)
        raise CheckpointError(
            f"no encoder {name!r}" + (f": did you mean {close[0]!r}?" if close else ""),
            expected="a file, a folder, hf://owner/name, or a name of timm's (canopy models list --encoders)",
        )
    return found.to_dict() | {"hf_hub_id": found.hf_hub_id, "license": found.license}


def _said(path: Path) -> dict[str, Any]:
    """What a file's metadata or a folder's config.json say: timm, mean, std, licence, source."""
    if path.is_dir():
        try:
            raw = json.loads((path / "config.json").read_text())
            cfg = raw.get("pretrained_cfg") or {}
            tag = f".{cfg['tag']}" if cfg.get("tag") else ""
            said = {"timm": raw["architecture"] + tag} if "architecture" in raw else {}
            return said | {k: cfg.get(k) for k in ("mean", "std")} | {"licence": cfg.get("license")}
        except (OSError, ValueError, AttributeError) as error:
            raise CheckpointError(f"has no readable config.json ({error})", where=path) from error
    said = metadata_of(path)
    return said | {k: _numbers(said[k]) for k in ("mean", "std") if k in said}


def metadata_of(path: Path) -> dict[str, str]:
    """Metadata of a safetensors file; {} of any other."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def facts_of(path: Path, said: Mapping[str, str]) -> dict[str, Any]:
    """What a file of canopy's own says of where it is from, for the card of what begins with it."""
    try:
        card = json.loads(said.get("card", "{}"))
    except ValueError:
        card = {}
    return {"file": path.name} | {k: card[k] for k in _TOLD if card.get(k)}


def _numbers(text: str) -> list[float]:
    """[0.5, 0.5] or 0.5,0.5."""
    return json.loads(text if text.startswith("[") else f"[{text}]")


def _config_of(name: str) -> EncoderConfig:
    """How timm builds the network of a name, in the words of our own config.

    Raises:
        CheckpointError: timm has none of this name, or a transformer unlike ours.
    """
    with torch.device("meta"):
        net: Any = timm.create_model(name, pretrained=False)
    rotary, plain = (isinstance(net, kind) for kind in (Eva, VisionTransformer))
    if not (rotary or plain):
        network = name.split(".")[0]
        return EncoderConfig(family="cnn", network=network, patch=CNN_PATCH_PX)
    block, depth = net.blocks[0], len(net.blocks)
    if not isinstance(block.mlp.act, nn.GELU) or (rotary and not isinstance(net.rope, RotaryEmbeddingDinoV3)):
        raise CheckpointError(
            "is a transformer of another kind", where=name, expected="a plain ViT, DINOv2's or DINOv3's"
        )
    scaled = not isinstance(getattr(block, "ls1", nn.Identity()), nn.Identity) or isinstance(
        getattr(block, "gamma_1", None), nn.Parameter
    )
    own: dict[str, Any] = {"family": "rope", "rope_type": "dinov3"}
    if rotary:
        own |= {"rope_temperature": net.rope.temperature, "rope_rotate_half": net.rope.rotate_half}
        own["qkv_bias"] = block.attn.q_bias is not None
    else:
        prefixed = not net.no_embed_class
        own = {"family": "vit", "pos_embed_prefix": prefixed, "pos_resize": "bicubic"}
        own |= {"pos_grid": net.patch_embed.grid_size[0], "qkv_bias": block.attn.qkv.bias is not None}
    return EncoderConfig(
        **own, dim=net.embed_dim, depth=depth, heads=block.attn.num_heads,
        patch=net.patch_embed.patch_size[0], mlp_ratio=block.mlp.fc1.out_features / net.embed_dim,
        registers=net.num_prefix_tokens - 1, layer_scale=1e-5 if scaled else None,
        taps=tuple(depth * k // 4 - 1 for k in (1, 2, 3, 4)), norm_taps=True, norm_eps=net.norm.eps,
    )  # fmt: skip
