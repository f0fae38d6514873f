"""HeightModel: any size, metres, normalisation inside, clear words for what it cannot take."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from canopy.errors import ConfigError, InputError
from canopy.models.config import EncoderConfig, ModelConfig
from canopy.models.height import pad_to_multiple

FAMILIES = ["v1-like", "v2-like", "ours", "separable", "patch 14"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(16, 16), (17, 40), (64, 48), (33, 100)])
def test_heights_come_at_the_pixels_of_the_image(make_model, family, size):
    model = make_model(family)
    height, spread = model.predict(torch.rand(2, 3, *size))
    assert height.shape == spread.shape == (2, 1, *size)
    assert height.dtype == torch.float32
    assert (height >= 0).all() and (spread >= 0).all()
    top = model.config.decoder.bin_max * model.config.decoder.scale
    assert (height <= top + 1e-3).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_images_of_a_batch_do_not_mix(make_model, family):
    model, images = make_model(family), torch.rand(3, 3, 48, 32)
    together = model(images)
    apart = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-4)


def test_forward_is_the_height_of_predict(make_model):
    model, image = make_model(), torch.rand(1, 3, 40, 40)
    assert torch.equal(model(image), model.predict(image).height_m)


def test_normalisation_lives_inside_and_is_saved(make_model):
    model = make_model()
    assert {"mean", "std", "centres"} <= set(model.state_dict())
    image = torch.rand(1, 3, 32, 32)
    before = model(image)
    assert not torch.allclose(before, model(image * 0.5))
    # Moving the input and the constants together changes nothing.
    model.mean.add_(0.1)
    torch.testing.assert_close(model(image + 0.1), before, atol=1e-4, rtol=1e-4)


def test_bad_inputs_say_what_was_expected(make_model):
    model = make_model()
    image = torch.rand(1, 3, 32, 32)
    image[0, 0, 3, 3] = float("nan")
    with pytest.raises(InputError, match=r"NaN.*fill_invalid"):
        model(image)
    with pytest.raises(InputError, match="at least 16x16"):
        model(torch.rand(1, 3, 15, 40))
    with pytest.raises(InputError, match=r"expected float \(B, 3, H, W\)"):
        model(torch.rand(1, 4, 32, 32))
    with pytest.raises(InputError, match="uint8"):
        model(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


@given(st.integers(16, 70), st.integers(16, 70), st.sampled_from([14, 16]))
@settings(max_examples=30, deadline=None)
def test_padding_never_changes_the_image_itself(height, width, multiple):
    image = torch.rand(1, 3, height, width)
    padded = pad_to_multiple(image, multiple)
    assert padded.shape[-2] % multiple == 0 and padded.shape[-1] % multiple == 0
    assert padded.shape[-2] - height < multiple and padded.shape[-1] - width < multiple
    assert torch.equal(padded[..., :height, :width], image)


def test_config_survives_json_and_refuses_what_it_does_not_know(make_model):
    import json

    config = make_model("v2-like").config
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ConfigError, match=r"encoder.*'dept'.*'depth'"):
        ModelConfig.from_dict({"encoder": {"dept": 3}})
    with pytest.raises(ConfigError, match="taps"):
        EncoderConfig(depth=4, taps=(0, 1, 2, 4))
    with pytest.raises(ConfigError, match="stem"):
        ModelConfig.from_dict({"decoder": {"detail": True}})


def test_a_gradient_reaches_every_parameter(make_model):
    model = make_model("ours").train()
    height, spread, scores = model.heights_and_scores(torch.rand(2, 3, 64, 64))
    (height.mean() + spread.mean() + scores.square().mean()).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert missing == []


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_the_maps_they_are_named_after(make_model, family):
    model, image = make_model(family), torch.rand(2, 3, 40, 57)
    made = model.layers(image, ("q0.05", "height_m", "q0.95", "spread_m"))
    height, spread = model.predict(image)
    assert made.shape == (2, 4, 40, 57)
    assert torch.equal(made[:, 1:2], height) and torch.equal(made[:, 3:], spread)
    assert (made[:, 0] < made[:, 2]).all() and (made[:, 0] >= 0).all()
    for name in ("slope", "q", "q1.5", "0.5"):
        with pytest.raises(ConfigError, match="no output"):
            model.layers(image, ("height_m", name))
