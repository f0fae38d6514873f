"""A whole run in miniature: trains, refuses to overwrite, resumes, exports a model that loads."""

from __future__ import annotations

import json
import math
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from canopy.chips.write import write_synth
from canopy.config import load_settings
from canopy.errors import CheckpointError, ConfigError, DataError
from canopy.models.registry import load_model
from canopy.training.callbacks import TrainingError
from canopy.training.fit import finetune
from canopy.training.settings import FinetuneSettings

helpers = runpy.run_path(str(Path(__file__).with_name("conftest.py")))
table = helpers["table"]
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


def skipped(saved: dict) -> list[int]:
    return next(v["skipped"] for k, v in saved["callbacks"].items() if "NanGuard" in k)


def test_a_run_leaves_its_settings_its_log_and_a_model(tiny_run):
    card = load_model(tiny_run / "model.safetensors").card
    assert card["steps"] == 6 and card["exported"].startswith("best")
    assert card["data"]["train_ids"] == ["p0", "p1", "p2", "p3"] and card["data"]["val_chips"] == 2
    assert card["val"]["all"]["n"] == 2 * 24 * 22 and card["settings"]["data"]["chips"] == ["chips"]
    assert str(tiny_run.parent) not in json.dumps(card) and card["command"].endswith("-o run")
    lines = table(tiny_run)
    train, val = [r for r in lines if r["loss"]], [r for r in lines if r["val_mae_m"]]
    assert [int(r["step"]) for r in train] == [1, 2, 3, 4, 5, 6]
    # Also those that are written first or count later: a ramp begins at 0.
    terms = ("loss", "charbonnier", "gradient", "two_hot", "footprint", "mae_m", "lr", "grad_norm", "minutes")
    assert all(math.isfinite(float(row[name])) for row in train for name in terms)
    assert float(train[0]["footprint"]) == 0 and sorted({int(r["step"]) for r in val}) == [2, 4, 6]
    assert all(float(r["val/site0/mae_m"]) > 0 and float(r["val/all/mae_m"]) > 0 for r in val)
    assert yaml.safe_load((tiny_run / "config.yaml").read_text())["batch"] == 2
    step = int(card["exported"].split()[-1])
    maes = {int(r["step"]): float(r["val_mae_m"]) for r in val}
    assert maes[step] == min(maes.values()) and (tiny_run / f"best-{step:07d}.ckpt").is_file()
    assert card["val"]["all"]["mae_m"] == pytest.approx(maes[step], abs=0.02)  # fp16 weights


def test_a_folder_is_begun_once_and_resumed_with_its_own_settings(config, tiny_run, tmp_path):
    with pytest.raises(ConfigError, match="holds a run already"):
        finetune(settings(config), tiny_run)
    with pytest.raises(ConfigError, match=r"other settings: loss\.l1, lr"):
        finetune(settings(config, "lr=0.01", "loss.l1=1"), tiny_run, resume=True)
    with pytest.raises(ConfigError, match="no run to resume"):
        finetune(settings(config), tmp_path / "elsewhere", resume=True)
    assert not (tmp_path / "elsewhere").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from canopy.config import load_settings
from canopy.training.callbacks import Schedule
from canopy.training.fit import finetune
from canopy.training.settings import FinetuneSettings
config, run, stop = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
after = Schedule.on_train_batch_end
def stepped(self, trainer, *args, **kwargs):
    after(self, trainer, *args, **kwargs)
    if trainer.global_step == stop:
        os.kill(os.getpid(), signal.SIGKILL)
Schedule.on_train_batch_end = stepped
finetune(load_settings(FinetuneSettings, config), run)
"""


def test_killed_and_resumed_it_ends_in_the_same_bits(config, tiny_run, tmp_path):
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
    weights = (load_model(run / "model.safetensors").state_dict() for run in (tiny_run, cut))
    assert same(*map(dict, weights))
    finetune(settings(config, "steps=8"), cut, resume=True)  # a finished run goes on
    assert load_model(cut / "model.safetensors").card["steps"] == 8


@pytest.mark.slow
def test_workers_change_nothing(config, tiny_run, tmp_path):
    finetune(settings(config, "workers=2"), tmp_path / "b")
    assert same(state(tiny_run)["state_dict"], state(tmp_path / "b")["state_dict"])


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(config, tmp_path):
    # No batch norms, which see one process's images, and nothing drawn at random by process.
    plain = ["model.encoder.stem=[]", "model.decoder.detail=false", "model.decoder.unit_norm=false"]
    plain += ["model.encoder.drop_path=0", "loss.ranked=0.1", "steps=4", "export=last"]
    finetune(settings(config, *plain, "batch=4"), tmp_path / "one")
    words = [sys.executable, "-m", "canopy", "train", str(config), *plain, "devices=2"]
    for more in ([], ["steps=6", "--resume"]):
        words_now = [*words, *more, "-o", str(tmp_path / "two"), "-q"]
        done = subprocess.run(
            words_now, env=os.environ | ONE_THREAD, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, done.stderr[-1500:]
        if not more:
            alone, both = (state(tmp_path / name)["current_model_state"] for name in ("one", "two"))
            for name, value in alone.items():
                torch.testing.assert_close(both[name], value, rtol=2e-4, atol=2e-5, msg=name)
            one, two = ([r for r in table(tmp_path / name) if r["val_n"]] for name in ("one", "two"))
            assert [r["val_n"] for r in one] == [r["val_n"] for r in two]  # each chip counts once
    assert state(tmp_path / "two")["global_step"] == 6


WITHOUT_GEO = """
import sys
blocked = ["rasterio", "geopandas", "pyproj", "odc", "shapely", "rioxarray", "xarray", "fiona"]
sys.modules.update(dict.fromkeys(blocked))
from pathlib import Path
from canopy.config import load_settings
from canopy.training.fit import finetune, pretrain
from canopy.training.settings import FinetuneSettings, PretrainSettings
config, smoke, out = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
chips = load_settings(FinetuneSettings, config).data.chips[0]
first = [f"data.chips={out}/synth", "probe.every=0", "steps=1"]
pretrain(load_settings(PretrainSettings, smoke, first), out / "p")
second = [f"data.chips=[{chips},{out}/synth]", "steps=1"]
finetune(load_settings(FinetuneSettings, config, second), out / "f")
"""


def test_pretraining_and_training_run_without_geo_libraries(config, repo, tmp_path):
    smoke = repo / "configs" / "pretrain" / "smoke.yaml"
    write_synth(tmp_path / "synth", 2, 64)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_GEO, str(config), str(smoke), str(tmp_path)],
        env=os.environ | ONE_THREAD, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-1500:]
    card = load_model(tmp_path / "f" / "model.safetensors").card
    assert card["data"]["train_ids"][-2:] == ["synth_1000", "synth_1001"]
    assert card["settings"]["data"]["chips"] == ["chips", "synth"]


def test_two_processes_do_not_share_a_folder(config, tiny_run):
    code = "import sys, pathlib; from canopy.config import load_settings\n"
    code += "from canopy.training.run_folder import held\n"
    code += "from canopy.training.settings import FinetuneSettings\n"
    code += "s = load_settings(FinetuneSettings, sys.argv[2])\n"
    code += "with held(pathlib.Path(sys.argv[1]), s, True, frozenset()): pass"
    words = [sys.executable, "-c", code, str(tiny_run), str(config)]
    from canopy.training.run_folder import held

    with held(tiny_run, settings(config), True, frozenset()):
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode and "another process trains here" in done.stderr
    assert subprocess.run(words).returncode == 0


def test_bad_steps_are_left_out_and_the_third_stops_the_run(config, tmp_path, monkeypatch):
    from canopy.training import losses

    real, calls = losses.charbonnier, []

    def poisoned(pred, *args):
        calls.append(1)
        return real(pred, *args) * (float("nan") if len(calls) in bad else 1.0)

    monkeypatch.setattr(losses, "charbonnier", poisoned)
    bad = {2, 4}
    finetune(settings(config), tmp_path / "two")
    saved = state(tmp_path / "two")
    assert len(calls) == saved["global_step"] == 6 and skipped(saved) == [1, 3]
    assert all(bool(torch.isfinite(v).all()) for v in saved["state_dict"].values())
    calls.clear()
    bad = {1, 2, 3}
    with pytest.raises(TrainingError, match=r"loss is nan, charbonnier is nan.* at step 2, .* \[0, 1\]"):
        finetune(settings(config), tmp_path / "three")


def test_an_overflow_in_the_stem_poisons_nothing(config, tmp_path, monkeypatch):
    from canopy.training.height import HeightModule

    real, calls = HeightModule.terms, []

    def blinding(self, batch):
        calls.append(1)
        return real(self, batch._replace(rgb=batch.rgb * 1e30) if len(calls) == 3 else batch)

    monkeypatch.setattr(HeightModule, "terms", blinding)
    finetune(settings(config), tmp_path / "run")
    saved = state(tmp_path / "run")
    assert skipped(saved) == [2] and saved["global_step"] == 6
    assert all(bool(torch.isfinite(v).all()) for v in saved["state_dict"].values())


def test_early_stop_keeps_the_best(config, tmp_path, monkeypatch):
    maes = iter([5.0, 4.0, 6.0, 6.0, 1.0])

    def scores(*args, **kwargs):
        return {"all": {"n": 1, "mae_m": next(maes), "r": 0.5, "bias_m": 0.0}}

    monkeypatch.setattr("canopy.training.height.table_of", scores)
    run = tmp_path / "run"
    finetune(settings(config, "steps=20", "patience=2"), run)
    assert state(run)["global_step"] == 8
    assert [p.name for p in run.glob("best-*")] == ["best-0000004.ckpt"]
    assert load_model(run / "model.safetensors").card["exported"].endswith("step 4")


def test_minutes_end_a_run_which_is_then_validated(config, tmp_path):
    run = tmp_path / "run"
    finetune(settings(config, "minutes=0.001", "steps=100000", "validate_every=1000"), run)
    card = load_model(run / "model.safetensors").card
    assert 0 < card["steps"] < 1000 and card["exported"].endswith(f"step {card['steps']}")
    finetune(settings(config, "minutes=0.001", "steps=100000", "validate_every=1000"), run, resume=True)
    assert load_model(run / "model.safetensors").card["steps"] == card["steps"]  # it is over


def test_val_may_be_trained_on_and_is_then_called_seen(config, tmp_path):
    run = tmp_path / "run"
    finetune(settings(config, "data.include_val=true", "steps=2"), run)
    card = load_model(run / "model.safetensors").card
    assert card["exported"] == "last" and "val" not in card and card["seen"]["all"]["n"] > 0
    assert card["data"]["train_chips"] == 6 and card["data"]["val_seen"]
    with pytest.raises(ConfigError, match="can choose nothing"):
        settings(config, "data.include_val=true", "patience=3")


def test_without_val_chips_the_last_weights_are_exported(config, shards, tmp_path):
    folder = helpers["write_folder"](tmp_path / "chips", ["train"] * 3)
    run = tmp_path / "run"
    finetune(settings(config, f"data.chips={folder}", "steps=3"), run)
    card = load_model(run / "model.safetensors").card
    assert card["exported"] == "last" and "val" not in card and state(run)["global_step"] == 3


def test_starting_from_other_weights(config, tiny_run, tmp_path):
    tensors = load_file(tiny_run / "model.safetensors")
    encoder = {k: v for k, v in tensors.items() if k.startswith("encoder.")}
    save_file(encoder, tmp_path / "encoder.safetensors", metadata={"card": '{"objective": "dinov2"}'})
    frozen = settings(config, "steps=3", f"init_from={tmp_path}/encoder.safetensors", "freeze_encoder=true")
    card = load_model(finetune(frozen, tmp_path / "frozen")).card
    assert card["started_from"] == {"file": "encoder.safetensors", "objective": "dinov2"}
    after = state(tmp_path / "frozen")["current_model_state"]
    assert all(torch.equal(after[f"model.{k}"], v.float()) for k, v in encoder.items())
    decoder = [k for k in tensors if k.startswith("decoder.")]
    assert any(not torch.equal(after[f"model.{k}"], tensors[k].float()) for k in decoder)
    for name, part in (("model.safetensors", "all"), ("last.ckpt", "encoder")):
        finetune(
            settings(config, "steps=1", f"init_from={tiny_run}/{name}", f"init_part={part}"), tmp_path / part
        )
    spoiled = dict(encoder)
    spoiled["encoder.new"] = spoiled.pop(next(iter(encoder)))
    save_file(spoiled, tmp_path / "spoiled.safetensors")
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    (tmp_path / "junk.ckpt").write_bytes(b"junk")
    for name, words in (
        (f"{tmp_path}/spoiled.safetensors", r"2 differences.*missing.*unexpected new"),
        (f"{tmp_path}/other.safetensors", "holds no encoder"),
        (f"{tmp_path}/junk.safetensors", "damaged"),
        (f"{tmp_path}/junk.ckpt", "no checkpoint"),
        (f"{tmp_path}/none.safetensors", "no such file"),
        ("default", "differences"),  # a model's name: that of another size
        ("nobody", "no model 'nobody'"),
    ):
        with pytest.raises(CheckpointError, match=words):
            finetune(settings(config, f"init_from={name}"), tmp_path / "bad" / Path(name).name)


def test_encoders_in_timms_names(shared):
    from canopy.models.config import ModelConfig
    from canopy.models.height import HeightModel
    from canopy.training.start import describe_start, start_from

    folder = shared / "data" / "encoders"
    half = {"head": "half", "bins": 8, "bin_max": 4.0, "weights": "softmax"}
    lite = {"family": "cnn", "network": "tf_efficientnet_lite2", "patch": 32}
    vit = {"family": "vit", "dim": 384, "depth": 12, "heads": 6, "patch": 14, "pos_grid": 37}
    vit |= {"taps": [5, 7, 8, 11], "norm_taps": True}
    for file, encoder, mean, std in (
        ("tf_efficientnet_lite2_imagenet", lite, [0.5] * 3, [0.5] * 3),
        ("vit_small_patch14_dinov2_imgfocus", vit, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ):
        path = folder / f"{file}.safetensors"
        raw = {"encoder": encoder, "decoder": half, "mean": mean, "std": std}
        model = HeightModel(ModelConfig.from_dict(raw))
        assert start_from(model, path) == "encoder"
        found = load_file(path)
        name = "conv_stem.weight" if encoder is lite else "blocks.3.attn.qkv.weight"
        ours = model.encoder.state_dict()[("net." if encoder is lite else "vit.") + name]
        assert torch.equal(ours, found[name].float())
        assert describe_start(path)["licence"] and describe_start(path)["timm"]
        other = HeightModel(ModelConfig.from_dict(raw | {"mean": [0.1] * 3}))
        with pytest.raises(CheckpointError, match=r"images of mean .*Set model\.mean"):
            start_from(other, path)


def test_fast_dev_run_leaves_nothing(config, tmp_path):
    finetune(settings(config, "init_from=null"), tmp_path / "run", fast_dev_run=True)
    assert not (tmp_path / "run").exists()
    with pytest.raises(DataError, match="no such chips"):
        finetune(settings(config, "data.chips=nowhere"), tmp_path / "run", fast_dev_run=True)


def test_settings_name_the_nearest_known_key(config):
    with pytest.raises(ConfigError, match=r"shift_reach.*did you mean 'shift_reach_m'"):
        settings(config, "loss.shift_reach=2")
    with pytest.raises(ConfigError, match=r"'dpth'.*'depth'"):
        settings(config, "model.encoder.dpth=2")
    for wrong in ("precision=16-mixed", "data.label_share=0", "loss.height_weight=[[5,1],[3,1]]"):
        with pytest.raises(ConfigError):
            settings(config, wrong)
    for wrong in ("device=auto", "device=cuda:1"):
        with pytest.raises(ConfigError, match="device=cuda or device=cpu"):
            settings(config, "devices=2", wrong)


def test_every_shipped_config_is_valid(repo):
    from canopy.models.height import HeightModel

    paths = sorted((repo / "configs" / "finetune").glob("*.yaml"))
    assert paths
    for path in paths:
        with torch.device("meta"):
            HeightModel(load_settings(FinetuneSettings, path).architecture)
