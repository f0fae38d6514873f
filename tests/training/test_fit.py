"""A whole run in miniature: trains, refuses to overwrite, resumes, exports a model that loads."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from canopy.config import load_settings
from canopy.errors import CheckpointError, ConfigError
from canopy.models.height import HeightModel
from canopy.models.registry import load_model
from canopy.training.callbacks import TrainingError
from canopy.training.fit import finetune
from canopy.training.settings import FinetuneSettings
from canopy.training.start import begin_from, held

ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def settings(config, *overrides) -> FinetuneSettings:
    return load_settings(FinetuneSettings, config, overrides)


def state(run) -> dict:
    return torch.load(run / "last.ckpt", map_location="cpu", weights_only=True)


def same(a, b) -> bool:
    """Whether two parts of checkpoints agree to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_a_run_leaves_its_settings_its_log_and_a_model(tiny_run, table):
    card = load_model(tiny_run / "model.safetensors").card
    assert card["steps"] == 6 and card["exported"].startswith("best")
    assert card["data"]["train_ids"] == ["p0", "p1", "p2", "p3"] and card["data"]["val_chips"] == 2
    assert card["val"]["all"]["n"] == 2 * 24 * 22 and card["settings"]["data"]["chips"] == ["chips"]
    assert str(tiny_run.parent) not in json.dumps(card) and card["command"].endswith("-o run")
    lines = table(tiny_run)
    train, val = [r for r in lines if r["loss"]], [r for r in lines if r["val_mae_m"]]
    assert [int(r["step"]) for r in train] == [1, 2, 3, 4, 5, 6]
    assert [int(r["step"]) for r in val] == [0, 2, 4, 6] and lines[0]["val_mae_m"]  # the start first
    assert all(math.isfinite(float(r["footprint"])) for r in train)  # also before its ramp begins
    assert yaml.safe_load((tiny_run / "config.yaml").read_text())["batch"] == 2
    step = int(card["exported"].split()[-1])
    maes = {int(r["step"]): float(r["val_mae_m"]) for r in val}
    assert maes[step] == min(maes[s] for s in (2, 4, 6)) and (tiny_run / f"best-{step:07d}.ckpt").is_file()
    assert card["val"]["all"]["mae_m"] == pytest.approx(maes[step], abs=0.02)  # fp16 weights


def test_a_folder_is_for_one_process_and_one_set_of_settings(config, tiny_run, tmp_path):
    with pytest.raises(ConfigError, match="holds a run already"):
        finetune(settings(config), tiny_run)
    with pytest.raises(ConfigError, match=r"other settings: loss\.ranked, lr"):
        finetune(settings(config, "lr=0.01", "loss.ranked=1", "steps=9"), tiny_run, resume=True)
    with pytest.raises(ConfigError, match="no run to resume"):
        finetune(settings(config), tmp_path / "elsewhere", resume=True)
    assert not (tmp_path / "elsewhere").exists()
    with held(tiny_run, settings(config), True), pytest.raises(ConfigError, match="another process trains"):
        finetune(settings(config), tiny_run, resume=True)
    with held(tiny_run, settings(config), True):
        pass


KILLED = """
import os, signal, sys
sys.modules.update(dict.fromkeys("rasterio geopandas pyproj odc shapely rioxarray xarray".split()))
from pathlib import Path
from canopy.config import load_settings
from canopy.training.callbacks import Schedule
from canopy.training.fit import finetune
from canopy.training.settings import FinetuneSettings
config, run, stop = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
after = Schedule.on_train_batch_end
def stepped(self, trainer, *args, **kwargs):
    after(self, trainer, *args, **kwargs)
    if trainer.global_step == stop:
        os.kill(os.getpid(), signal.SIGKILL)
Schedule.on_train_batch_end = stepped
finetune(load_settings(FinetuneSettings, config), run)
"""


def test_killed_without_geo_libraries_and_resumed_it_ends_in_the_same_bits(config, tiny_run, tmp_path, table):
    cut = tmp_path / "cut"
    done = subprocess.run(  # checkpoints are written at steps 2, 4 and 6
        [sys.executable, "-c", KILLED, str(config), str(cut), "3"],
        env=os.environ | ONE_THREAD, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr[-800:]
    assert state(cut)["global_step"] == 2 and not (cut / "model.safetensors").exists()
    finetune(settings(config), cut, resume=True)
    whole, resumed = state(tiny_run), state(cut)
    for name in ("state_dict", "current_model_state", "optimizer_states", "global_step"):
        assert same(whole[name], resumed[name]), name
    losses = [
        {r["step"]: (r["loss"], r["val_mae_m"]) for r in table(run) if int(r["step"]) > 3}
        for run in (tiny_run, cut)
    ]
    assert losses[0] == losses[1]
    finetune(settings(config, "steps=8"), cut, resume=True)  # a finished run goes on
    assert load_model(cut / "model.safetensors").card["steps"] == 8


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(config, tmp_path, table):
    # No batch norms, which see one process's images, and nothing drawn at random by process.
    plain = ["model.encoder.stem=[]", "model.decoder.detail=false", "model.decoder.unit_norm=false"]
    plain += ["model.encoder.drop_path=0", "loss.ranked=0.1", "steps=4", "export=last"]
    finetune(settings(config, *plain, "batch=4"), tmp_path / "one")
    words = [sys.executable, "-m", "canopy", "train", str(config), *plain, "devices=2", "strategy=ddp", "-q"]
    for more in ([], ["steps=6", "--resume"]):
        done = subprocess.run(
            [*words, *more, "-o", str(tmp_path / "two")],
            env=os.environ | ONE_THREAD, capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-1500:]
        if not more:
            alone, both = (state(tmp_path / name)["current_model_state"] for name in ("one", "two"))
            for name, value in alone.items():
                torch.testing.assert_close(both[name], value, rtol=2e-4, atol=2e-5, msg=name)
            one, two = ([r for r in table(tmp_path / name) if r["val_n"]] for name in ("one", "two"))
            assert [r["val_n"] for r in one] == [r["val_n"] for r in two]  # each chip counts once
    assert state(tmp_path / "two")["global_step"] == 6


def test_bad_steps_are_left_out_and_the_third_stops_the_run(config, tmp_path, monkeypatch):
    from canopy.training import losses

    real, calls = losses.charbonnier, []

    def poisoned(pred, *args):
        calls.append(1)
        return real(pred, *args) * (float("nan") if len(calls) in (1, 2, 5) else 1.0)

    monkeypatch.setattr(losses, "charbonnier", poisoned)
    with pytest.raises(TrainingError, match=r"loss is nan, charbonnier is nan.* at step 4, .* \[0, 1\]"):
        finetune(settings(config), tmp_path / "run")
    saved = state(tmp_path / "run")
    assert saved["global_step"] == 4
    assert all(bool(torch.isfinite(v).all()) for v in saved["state_dict"].values())


def test_early_stop_keeps_the_best(config, tmp_path, monkeypatch):
    maes = iter([9.0, 5.0, 4.0, 6.0, 6.0, 1.0])  # the first before the first step

    def scores(*args, **kwargs):
        return {"all": {"n": 1, "mae_m": next(maes), "r": 0.5, "bias_m": 0.0}}

    monkeypatch.setattr("canopy.training.height.table_of", scores)
    run = tmp_path / "run"
    finetune(settings(config, "steps=20", "patience=2"), run)
    assert state(run)["global_step"] == 8
    assert [p.name for p in run.glob("best-*")] == ["best-0000004.ckpt"]
    assert load_model(run / "model.safetensors").card["exported"].endswith("step 4")


def test_minutes_end_a_run_which_is_then_validated(config, tmp_path):
    brief = settings(config, "minutes=0.001", "steps=100000", "validate_every=1000")
    card = finetune(brief, tmp_path / "run")
    assert 0 < card["steps"] < 1000 and card["exported"].endswith(f"step {card['steps']}")
    assert finetune(brief, tmp_path / "run", resume=True)["steps"] == card["steps"]  # it is over


def test_val_may_be_trained_on_and_is_then_called_seen(config, tmp_path):
    card = finetune(settings(config, "data.include_val=true", "steps=2"), tmp_path / "run")
    assert card["exported"] == "last" and "val" not in card and card["seen"]["all"]["n"] > 0
    assert card["data"]["train_chips"] == 6 and card["data"]["val_seen"]


# ---- where weights come from ---------------------------------------------------------------------------
def test_a_frozen_encoder_stays_what_it_was(config, tiny_run, tmp_path):
    tensors = load_file(tiny_run / "model.safetensors")
    encoder = {k: v for k, v in tensors.items() if k.startswith("encoder.")}
    save_file(encoder, tmp_path / "encoder.safetensors", metadata={"card": '{"objective": "dinov2"}'})
    frozen = settings(config, "steps=2", f"init_from={tmp_path}/encoder.safetensors", "freeze_encoder=true")
    card = finetune(frozen, tmp_path / "frozen")
    assert card["started_from"] == {"file": "encoder.safetensors", "objective": "dinov2"}
    after = state(tmp_path / "frozen")["current_model_state"]
    assert all(torch.equal(after[f"model.{k}"], v.float()) for k, v in encoder.items())
    decoder = [k for k in tensors if k.startswith("decoder.")]
    assert any(not torch.equal(after[f"model.{k}"], tensors[k].float()) for k in decoder)


def start(model, path) -> None:
    _, found = begin_from(FinetuneSettings(init_from=str(path), model=model.config.to_dict()))
    found.load_into(model)


def test_whole_models_and_encoders_are_loaded_strictly(config, tiny_run, tmp_path):
    tensors = load_file(tiny_run / "model.safetensors")
    key = "decoder.head.conv1.weight"
    for name in ("model.safetensors", "last.ckpt"):
        model = HeightModel(settings(config).architecture)
        start(model, tiny_run / name)
        assert torch.allclose(model.state_dict()[key], tensors[key].float(), atol=0.05)
    encoder = {k: v for k, v in tensors.items() if k.startswith("encoder.")}
    encoder["encoder.new"] = encoder.pop(next(iter(encoder)))
    save_file(encoder, tmp_path / "spoiled.safetensors")
    save_file(encoder, tmp_path / "shifted.safetensors", metadata={"mean": "[0.1, 0.1, 0.1]"})
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    (tmp_path / "junk.ckpt").write_bytes(b"junk")
    for name, words in (
        ("spoiled.safetensors", r"2 differences.*missing.*unexpected new"),
        ("shifted.safetensors", r"images of mean .*Set model\.mean"),
        ("other.safetensors", "holds no encoder"), ("junk.safetensors", "neither a PyTorch"),
        ("junk.ckpt", "neither a PyTorch"), ("none.safetensors", "no such file"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=words):
            start(model, tmp_path / name)
    with pytest.raises(CheckpointError, match="no model 'nobody'"):
        finetune(settings(config, "init_from=nobody"), tmp_path / "run")


def test_a_model_that_training_goes_on_from_keeps_its_description(config, shards, tiny_run, tmp_path):
    from canopy.models.checkpoint import save_checkpoint

    first = load_model(tiny_run / "model.safetensors")
    first.config = first.config.replaced(crop_px=96, overlap_px=40)
    save_checkpoint(tmp_path / "first.safetensors", first, {"name": "first", "licence": "CC-BY-4.0"})
    plain = FinetuneSettings(
        data={"chips": shards}, init_from=str(tmp_path / "first.safetensors"), steps=1, minutes=None, batch=2,
        crop_px=32, tensorboard=False, lr=1e-9, export="last",
    )  # fmt: skip
    card = finetune(plain, tmp_path / "run")
    made = load_model(tmp_path / "run" / "model.safetensors")
    assert made.config == first.config and made.config.crop_px == 96
    assert card["licence"] == "not stated" and card["started_from"]["licence"] == "CC-BY-4.0"
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(first(x), made(x), atol=0.05)


def test_an_encoder_brings_its_architecture(config, shared, tiny_run, tmp_path):
    tensors, own = load_file(tiny_run / "model.safetensors"), tmp_path / "encoder.safetensors"
    inside = load_model(tiny_run / "model.safetensors").config.encoder
    said = {
        "encoder": json.dumps(inside.model_dump(mode="json")),
        "mean": "[0.4, 0.4, 0.4]",
        "std": "[0.2, 0.2, 0.2]",
    }
    save_file({k: v for k, v in tensors.items() if k.startswith("encoder.")}, own, metadata=said)
    file = shared / "data" / "encoders" / "tf_efficientnet_lite2_imagenet.safetensors"
    outside = FinetuneSettings(model={"encoder": {"init": str(file), "drop_path": 0.1}})
    ready, found = begin_from(outside)
    model = HeightModel(ready.architecture)
    found.load_into(model)
    name = "conv_stem.weight"
    assert torch.equal(model.encoder.state_dict()["net." + name], load_file(file)[name].float())
    assert ready.architecture.mean == (0.5,) * 3 and ready.architecture.encoder.drop_path == 0.1
    assert found.facts["licence"] == "Apache-2.0" and found.facts["timm"] == "tf_efficientnet_lite2"
    assert begin_from(ready)[0] == ready  # config.yaml can be taken back
    pretrained = FinetuneSettings(model={"encoder": {"init": str(own)}})
    assert begin_from(pretrained)[0].architecture.encoder.dim == 32
    with pytest.raises(ConfigError, match=r"init decides .*depth.* itself"):
        begin_from(settings(config, f"model.encoder.init={file}"))
    with pytest.raises(ConfigError, match="init decides mean itself"):
        begin_from(FinetuneSettings(model={"encoder": {"init": str(file)}, "mean": [0.4] * 3}))
    with pytest.raises(ConfigError, match="give one"):
        settings(config, f"model.encoder.init={file}", "init_from=default")


# ---- settings ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["loss.shift_reach=2"], r"shift_reach.*did you mean 'shift_reach_m'"),
        (["model.encoder.dpth=2"], r"dpth'.*'depth'"),
        (["precision=16-mixed"], "precision"),
        (["data.label_share=0"], "label_share"),
        (["loss.height_weight=[[5,1],[3,1]]"], "rising"),
        (["devices=2", "device=auto"], "device=cuda or device=cpu"),
        (["data.include_val=true", "patience=3"], "can choose nothing"),
        (["data.include_val=true", "data.val_sites=[a]"], "unseen"),
    ],
)
def test_settings_that_cannot_be(config, words, says):
    with pytest.raises(ConfigError, match=says):
        settings(config, *words)


def test_every_shipped_config_is_valid(repo):
    paths = sorted((repo / "configs" / "finetune").glob("*.yaml"))
    assert len(paths) > 5
    for path in paths:
        with torch.device("meta"):
            HeightModel(load_settings(FinetuneSettings, path).architecture)
