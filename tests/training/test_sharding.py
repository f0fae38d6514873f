"""Weights spread over processes (FSDP2) train as whole ones do, and a resumed run as an uninterrupted one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from canopy.config import load_settings, validate_settings
from canopy.errors import ConfigError
from canopy.models.height import HeightModel
from canopy.training.fit import pretrain
from canopy.training.optim import local, sharded_parts, whole, whole_state
from canopy.training.settings import PretrainSettings
from canopy.training.ssl import DinoModule
from canopy.training.ssl_data import open_stream

# Two processes; rank 0 notes how much of the weights it holds. With a number, both fail before that step.
SCRIPT = """
import json, sys
from pathlib import Path
from canopy.config import load_settings
from canopy.training.ssl import PretrainModule
from canopy.training.fit import pretrain
from canopy.training.settings import PretrainSettings
from canopy.training.optim import local
config, run, how, stop = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
step = PretrainModule.optimizer_step
def watched(self, *args, **kwargs):
    if self.global_step == stop:
        raise RuntimeError("power cut")
    step(self, *args, **kwargs)
    sizes = [(local(p).numel(), p.numel()) for p in self.parameters()]
    if self.global_rank == 0:
        Path(f"{run}-sizes.json").write_text(json.dumps([sum(x) for x in zip(*sizes)]))
PretrainModule.optimizer_step = watched
pretrain(load_settings(PretrainSettings, config, sys.argv[5:]), run, resume=how == "resume")
"""


def test_everything_large_is_spread(repo, views_dir):
    settings = load_settings(
        PretrainSettings, repo / "configs/pretrain/large-published.yaml", [f"data.chips={views_dir}"]
    )
    stream = open_stream(settings)
    with torch.device("meta"):
        module = DinoModule(settings, stream, None)
    parts = sharded_parts(module)
    assert len(parts) == len(set(parts)) == 2 * (24 + 2)
    inside = [set(part.modules()) for part in parts]
    assert all(sum(part in others for others in inside) == 1 for part in parts)
    spread = sum(p.numel() for part in parts for p in part.parameters())
    assert spread > 0.99 * sum(p.numel() for p in module.parameters())


def test_without_processes_all_is_whole():
    layer = torch.nn.Linear(2, 2)
    assert local(layer.weight) is whole(layer.weight) is layer.weight
    assert whole_state(layer).keys() == layer.state_dict().keys()


def test_fsdp_and_compile_are_not_offered_together():
    with pytest.raises(ConfigError, match="fsdp and compile"):
        validate_settings(PretrainSettings, {"strategy": "fsdp", "compile": True}, "config")


def test_a_run_is_resumed_with_its_own_strategy(repo, views_dir, tmp_path):
    words = [f"data.chips={views_dir}", "steps=2", "probe.every=0"]
    settings = load_settings(PretrainSettings, repo / "configs/pretrain/smoke.yaml", words)
    (tmp_path / "last.ckpt").touch()
    (tmp_path / "config.yaml").write_text("strategy: fsdp")
    with pytest.raises(ConfigError, match=r"started with other settings: .*strategy"):
        pretrain(settings, tmp_path, resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["dinov2", "mae"])
def test_spread_is_as_good_as_whole_and_resumes(repo, views_dir, tmp_path, objective):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    config = repo / "configs" / "pretrain" / "smoke.yaml"

    def run(name: str, strategy: str, how: str = "new", stop: int = -1) -> tuple[int, Path]:
        words = [f"data.chips={views_dir}", "steps=4", "probe.every=2", "log_every=1", "devices=2",
                 "checkpoint_every=2", f"strategy={strategy}", f"objective={objective}"]  # fmt: skip
        done = subprocess.run(
            [sys.executable, str(script), str(config), str(tmp_path / name), how, str(stop), *words],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        assert stop >= 0 or done.returncode == 0, done.stderr[-1500:]
        return done.returncode, tmp_path / name

    _, together = run("ddp", "ddp")
    _, spread = run("fsdp", "fsdp")
    held, every = json.loads((tmp_path / "fsdp-sizes.json").read_text())
    assert held < 0.75 * every  # a tiny model: what is not spread weighs more than in a large one
    one, two = (load_file(d / "encoder.safetensors") for d in (together, spread))
    wanted = HeightModel(load_settings(PretrainSettings, config).architecture).state_dict()
    assert {k: v.shape for k, v in two.items()} == {
        k: v.shape for k, v in wanted.items() if k.startswith("encoder.")
    }
    for name, value in one.items():
        assert torch.allclose(value, two[name], rtol=1e-3, atol=2e-5), name

    code, cut = run("cut", "fsdp", stop=3)
    assert code and (cut / "last.ckpt").is_file() and not (cut / "encoder.safetensors").exists()
    run("cut", "fsdp", "resume")
    first, second = (torch.load(d / "last.ckpt", weights_only=True) for d in (spread, cut))
    assert first["global_step"] == second["global_step"] == 4
    assert all(torch.equal(v, second["state_dict"][k]) for k, v in first["state_dict"].items())
    left, right = (state["optimizer_states"][0]["state"] for state in (first, second))
    for key, moments in left.items():
        assert all(torch.equal(v, right[key][k]) for k, v in moments.items())
