"""Encoders that others pretrained: built as timm builds them, loaded strictly, known by what they say."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from canopy.errors import CheckpointError
from canopy.models.encoder import CnnEncoder, Encoder
from canopy.models.pretrained import LISTED, listed_encoders, open_encoder


def hub_folder(folder, name, **cfg):
    """A folder as timm writes it for the hub, random weights and a classifier."""
    torch.manual_seed(0)
    net = timm.create_model(name.split(".")[0], pretrained=False, num_classes=7).eval()
    folder.mkdir()
    save_file(net.state_dict(), folder / "model.safetensors")
    said = {"tag": name.split(".")[1], "mean": [0.4] * 3, "std": [0.2] * 3, "license": "mit", **cfg}
    (folder / "config.json").write_text(
        json.dumps({"architecture": name.split(".")[0], "num_classes": 7, "pretrained_cfg": said})
    )
    return net


@pytest.mark.parametrize(
    "name",
    [
        "vit_small_patch14_dinov2.lvd142m", "vit_small_patch14_reg4_dinov2.lvd142m",
        "vit_small_patch16_dinov3.lvd1689m", "vit_tiny_patch16_224.augreg_in21k",
        "tf_efficientnet_lite2.in1k",
    ],
)  # fmt: skip
def test_a_hub_folder_gives_timms_own_features(name, tmp_path):
    net = hub_folder(tmp_path / "hub", name)
    found = open_encoder(str(tmp_path / "hub"))
    assert found.facts == {"file": "hub", "timm": name, "licence": "mit", "source": "not stated"}
    assert found.mean == (0.4,) * 3 and found.std == (0.2,) * 3
    encoder = (CnnEncoder if found.config.family == "cnn" else Encoder)(found.config).eval()
    found.load_into(encoder)
    side = 4 * found.config.patch
    x = torch.randn(2, 3, side, side)
    with torch.no_grad():
        ours = encoder(x).maps
        if found.config.family == "cnn":
            theirs = timm.create_model(name.split(".")[0], pretrained=False, features_only=True).eval()
            theirs.load_state_dict({k: v for k, v in net.state_dict().items() if k in theirs.state_dict()})
            theirs = theirs(x)
        else:
            # Theirs is of one size: the same network, made for this one.
            free = timm.create_model(
                name.split(".")[0], pretrained=False, num_classes=7, dynamic_img_size=True
            ).eval()
            free.load_state_dict(net.state_dict())
            taps = list(found.config.taps)
            theirs = free.forward_intermediates(x, indices=taps, norm=True, intermediates_only=True)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours, theirs, strict=True))


def test_the_encoders_of_the_data_pack(shared):
    for file, family in (
        ("tf_efficientnet_lite2_imagenet", "cnn"),
        ("vit_small_patch14_dinov2_imgfocus", "vit"),
    ):
        found = open_encoder(str(shared / "data" / "encoders" / f"{file}.safetensors"))
        assert found.config.family == family and found.facts["licence"] != "not stated"
        found.load_into((CnnEncoder if family == "cnn" else Encoder)(found.config))


def test_what_is_no_encoder_is_said(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"does not say which"):
        open_encoder(str(tmp_path / "a.safetensors"))
    with pytest.raises(CheckpointError, match="did you mean 'vit_small_patch14_dinov2"):
        open_encoder("vit_smal_patch14_dinov2.lvd142m")
    with pytest.raises(CheckpointError, match="another kind"):
        hub_folder(tmp_path / "eva", "eva02_tiny_patch14_224.mim_in22k")
        open_encoder(str(tmp_path / "eva"))
    hub_folder(tmp_path / "cut", "vit_tiny_patch16_224.augreg_in21k")
    found = open_encoder(str(tmp_path / "cut"))
    save_file({"norm.weight": torch.zeros(192)}, tmp_path / "cut" / "model.safetensors")
    with pytest.raises(CheckpointError, match="missing vit"):
        found.load_into(Encoder(found.config))
    assert [row["name"] for row in listed_encoders()] == list(LISTED)
