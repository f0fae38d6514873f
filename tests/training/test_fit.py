"""A whole run in miniature: trains, refuses to overwrite, resumes, exports a model that loads."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch
import yaml

from canopy.config import load_settings
from canopy.errors import CheckpointError, ConfigError, DataError
from canopy.models.checkpoint import load_model
from canopy.training.callbacks import TrainingError
from canopy.training.fit import finetune
from canopy.training.settings import FinetuneSettings


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def settings(config, *overrides) -> FinetuneSettings:
    return load_settings(FinetuneSettings, config, overrides)


def state(run) -> dict:
    return torch.load(run / "last.ckpt", map_location="cpu", weights_only=True)


def same(a, b) -> bool:
    """Whether two checkpoints agree to the bit, but for the clock."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k != "trained_s")
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def same_run(a, b) -> bool:
    return all(
        same(state(a)[k], state(b)[k]) for k in ("state_dict", "optimizer_states", "canopy", "global_step")
    )


def table(path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_train_export_and_go_on(config, tmp_path):
    run = tmp_path / "run"
    exported = finetune(settings(config), run, command="test")
    card = load_model(exported).card
    assert card["steps"] == 6 and card["exported"].startswith("best")
    assert card["data"]["train_ids"] == ["p0", "p1", "p2", "p3"] and card["data"]["val_chips"] == 2
    assert card["val"]["all"]["n"] == 2 * 24 * 22 and "chips" in card["settings"]["data"]["chips"]
    assert str(tmp_path) not in json.dumps(card)
    train, val = table(run / "train.csv"), table(run / "val.csv")
    assert [int(r["step"]) for r in train] == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(float(value)) for r in train for value in r.values())
    assert {r["site"] for r in val} == {"site0", "site1", "all but plots", "all"} and len(val) == 3 * 4
    assert yaml.safe_load((run / "config.yaml").read_text())["batch"] == 2
    step = int(card["exported"].split()[-1])
    maes = {int(r["step"]): float(r["mae_m"]) for r in val if r["site"] == "all"}
    assert maes[step] == min(maes.values()) and (run / f"best-{step:07d}.safetensors").is_file()
    assert card["val"]["all"]["mae_m"] == pytest.approx(maes[step], abs=0.02)  # fp16 weights

    with pytest.raises(ConfigError, match="holds a run already"):
        finetune(settings(config), run)
    with pytest.raises(ConfigError, match=r"other settings: loss\.l1, lr"):
        finetune(settings(config, "lr=0.01", "loss.l1=1"), run, resume=True)
    finetune(settings(config, "steps=8"), run, resume=True)
    assert load_model(exported).card["steps"] == 8
    assert [int(r["step"]) for r in table(run / "train.csv")] == [*range(1, 9)]
    with pytest.raises(ConfigError, match="no run to resume"):
        finetune(settings(config), tmp_path / "elsewhere", resume=True)


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from canopy.config import load_settings
from canopy.training.height import HeightModule
from canopy.training.fit import finetune
from canopy.training.settings import FinetuneSettings
config, run, stop, where = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
torch.set_num_threads(1)
after, save = HeightModule._after, torch.save
def die():
    os.kill(os.getpid(), signal.SIGKILL)
def stepped(self, *args):
    after(self, *args)
    if where == "after" and self.global_step == stop:
        die()
def torn(obj, file, *args, **kwargs):
    if where == "saving" and obj["global_step"] == stop:
        Path(run, ".last.ckpt.part").write_bytes(b"half")
        die()
    return save(obj, file, *args, **kwargs)
HeightModule._after, torch.save = stepped, torn
finetune(load_settings(FinetuneSettings, config), run, resume=(run / "last.ckpt").exists())
"""


def test_killed_at_any_step_and_resumed_it_ends_in_the_same_bits(config, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finetune(settings(config), whole)
    # Checkpoints are written at steps 2, 4 and 6: once between two of them, once in the middle of one.
    for stop, where in ((3, "after"), (4, "saving")):
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(config), str(cut), str(stop), where],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == -signal.SIGKILL, done.stderr[-800:]
        assert state(cut)["global_step"] == 2
    finetune(settings(config), cut, resume=True)
    assert same_run(whole, cut)
    for name in ("train.csv", "val.csv"):
        one, two = (
            [{k: v for k, v in row.items() if k != "minutes"} for row in table(run / name)]
            for run in (whole, cut)
        )
        assert one == two
    weights = (load_model(run / "model.safetensors").state_dict().values() for run in (whole, cut))
    assert all(torch.equal(x, y) for x, y in zip(*weights, strict=True))


def test_workers_change_nothing(config, tmp_path):
    finetune(settings(config, "steps=2"), tmp_path / "a")
    finetune(settings(config, "steps=2", "workers=2"), tmp_path / "b")
    assert same(state(tmp_path / "a")["state_dict"], state(tmp_path / "b")["state_dict"])


WITHOUT_GEO = """
import sys
blocked = ["rasterio", "geopandas", "pyproj", "odc", "shapely", "rioxarray", "xarray", "fiona"]
sys.modules.update(dict.fromkeys(blocked))
from pathlib import Path
from canopy.chips.write import write_synth
from canopy.config import load_settings
from canopy.training.fit import finetune
from canopy.training.fit import pretrain
from canopy.training.settings import PretrainSettings
from canopy.training.settings import FinetuneSettings
config, smoke, out = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
write_synth(out / "synth", 2, 64)
chips = load_settings(FinetuneSettings, config).data.chips[0]
first = [f"data.chips={out}/synth", "probe.every=0", "steps=1"]
pretrain(load_settings(PretrainSettings, smoke, first), out / "p")
second = [f"data.chips=[{chips},{out}/synth]", "steps=1"]
finetune(load_settings(FinetuneSettings, config, second), out / "f")
"""


def test_pretraining_and_training_run_without_geo_libraries(config, repo, tmp_path):
    smoke = repo / "configs" / "pretrain" / "smoke.yaml"
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_GEO, str(config), str(smoke), str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-1500:]
    card = load_model(tmp_path / "f" / "model.safetensors").card
    assert card["data"]["train_ids"][-2:] == ["synth_1000", "synth_1001"]
    assert card["settings"]["data"]["chips"] == ["chips", "synth"]


def test_two_processes_do_not_share_a_folder(config, tmp_path):
    from canopy.training.run_folder import locked

    run = tmp_path / "run"
    code = "import sys, pathlib; from canopy.training.run_folder import locked\n"
    code += "with locked(pathlib.Path(sys.argv[1])): pass"
    with locked(run):
        done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True)
        assert done.returncode and "another process trains here" in done.stderr
    assert subprocess.run([sys.executable, "-c", code, str(run)]).returncode == 0


def test_bad_steps_are_left_out_and_the_third_stops_the_run(config, tmp_path, monkeypatch):
    from canopy.training import losses as height_losses

    real, calls = height_losses.charbonnier, []

    def poisoned(pred, *args):
        calls.append(1)
        return real(pred, *args) * (float("nan") if len(calls) in bad else 1.0)

    monkeypatch.setattr("canopy.training.losses.charbonnier", poisoned)
    bad = {2, 4}
    finetune(settings(config), tmp_path / "two")
    saved = state(tmp_path / "two")
    assert len(calls) == 8 and saved["global_step"] == 6 and saved["canopy"]["guard"] == {"skipped": [1, 3]}
    assert all(bool(torch.isfinite(v).all()) for v in saved["state_dict"].values())
    calls.clear()
    bad = {1, 2, 3}
    with pytest.raises(TrainingError, match=r"loss is nan.* at step 2, .* \[0, 1\]"):
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
    assert saved["canopy"]["guard"] == {"skipped": [2]} and saved["global_step"] == 6
    assert all(bool(torch.isfinite(v).all()) for v in saved["state_dict"].values())


def test_early_stop_keeps_the_best(config, tmp_path, monkeypatch):
    maes = iter([5.0, 4.0, 6.0, 6.0, 1.0])

    def scores(*args, **kwargs):
        return {"all": {"n": 1, "mae_m": next(maes), "r": 0.5, "bias_m": 0.0}}

    monkeypatch.setattr("canopy.training.height.score_chips", scores)
    run = tmp_path / "run"
    finetune(settings(config, "steps=20", "patience=2"), run)
    assert state(run)["global_step"] == 8 and state(run)["canopy"]["best"]["step"] == 4
    assert [p.name for p in run.glob("best-*")] == ["best-0000004.safetensors"]
    assert load_model(run / "model.safetensors").card["exported"].endswith("step 4")
    finetune(settings(config, "steps=30", "patience=2"), run, resume=True)  # it stays stopped
    assert state(run)["global_step"] == 8


def test_val_may_be_trained_on_and_is_then_called_seen(config, tmp_path):
    run = tmp_path / "run"
    finetune(settings(config, "data.include_val=true", "steps=2"), run)
    card = load_model(run / "model.safetensors").card
    assert card["exported"] == "last" and "val" not in card and card["seen"]["all"]["n"] > 0
    assert card["data"]["train_chips"] == 6 and card["data"]["val_seen"]
    with pytest.raises(ConfigError, match="can choose nothing"):
        settings(config, "data.include_val=true", "patience=3")


def test_starting_from_other_weights(config, tmp_path):
    from safetensors.torch import load_file, save_file

    first = finetune(settings(config, "steps=2"), tmp_path / "first")
    tensors = load_file(first)
    encoder = {k: v for k, v in tensors.items() if k.startswith("encoder.")}
    save_file(encoder, tmp_path / "encoder.safetensors", metadata={"card": '{"objective": "dinov2"}'})
    frozen = settings(config, "steps=3", f"init_from={tmp_path}/encoder.safetensors", "freeze_encoder=true")
    card = load_model(finetune(frozen, tmp_path / "frozen")).card
    assert card["started_from"] == {"file": "encoder.safetensors", "objective": "dinov2"}
    after = state(tmp_path / "frozen")["state_dict"]
    assert all(torch.equal(after[f"model.{k}"], v.float()) for k, v in encoder.items())
    moved = [
        k
        for k in tensors
        if k.startswith("decoder.") and not torch.equal(after[f"model.{k}"], tensors[k].float())
    ]
    assert moved
    for name, part in (("first/model.safetensors", "all"), ("first/last.ckpt", "encoder")):
        more = settings(config, "steps=1", f"init_from={tmp_path}/{name}", f"init_part={part}")
        finetune(more, tmp_path / part)

    spoiled = dict(encoder)
    spoiled["encoder.new"] = spoiled.pop(next(iter(encoder)))
    save_file(spoiled, tmp_path / "spoiled.safetensors")
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    (tmp_path / "junk.ckpt").write_bytes(b"junk")
    for name, words in (
        ("spoiled.safetensors", r"2 differences.*missing.*unexpected new"),
        ("other.safetensors", "holds no encoder"),
        ("junk.safetensors", "damaged"),
        ("junk.ckpt", "no checkpoint"),
        ("none.safetensors", "no such file"),
    ):
        with pytest.raises(CheckpointError, match=words):
            finetune(settings(config, f"init_from={tmp_path}/{name}"), tmp_path / "bad" / name)


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
    for wrong in (
        "precision=16-mixed",
        "data.label_share=0",
        "loss.height_weight=[[5,1],[3,1]]",
        "init_part=all",
    ):
        with pytest.raises(ConfigError):
            settings(config, wrong)


def test_every_shipped_config_is_valid(repo):
    from canopy.models.height import HeightModel

    paths = sorted((repo / "configs" / "finetune").glob("*.yaml"))
    assert paths
    for path in paths:
        with torch.device("meta"):
            HeightModel(load_settings(FinetuneSettings, path).architecture)
