"""torch.compile changes how steps are computed and not what they give."""

from __future__ import annotations

import csv
import shutil

import pytest
import torch

from canopy.config import load_settings
from canopy.models.checkpoint import load_model
from canopy.training.fit import finetune, pretrain
from canopy.training.height import HeightModule
from canopy.training.optim import compile_parts
from canopy.training.settings import FinetuneSettings, PretrainSettings

needs_compiler = pytest.mark.skipif(
    not shutil.which("g++"), reason="torch.compile on a CPU needs a C++ compiler"
)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """What other settings (of randomness, say) had compiled on this machine is not found again."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))


def column(path, name: str) -> list[float]:
    with path.open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def test_what_is_compiled_keeps_its_names_and_the_average_stays_plain(config):
    settings = load_settings(FinetuneSettings, config)
    from canopy.models.height import HeightModel

    model = HeightModel(settings.architecture)
    names = list(model.state_dict())
    module = HeightModule(model, settings, None, [])  # type: ignore[arg-type]
    assert compile_parts(model) == 4 + 1 + 1  # blocks, stem, decoder
    assert list(model.state_dict()) == names == list(module.ema.state_dict())
    assert all(part._compiled_call_impl is None for part in module.ema.modules())


@pytest.mark.slow
@needs_compiler
def test_fine_tuning_compiled_is_the_same(config, tmp_path, own_cache):
    torch.set_num_threads(1)
    for name in ("false", "true"):
        torch._dynamo.reset()
        finetune(load_settings(FinetuneSettings, config, [f"compile={name}", "steps=3"]), tmp_path / name)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 3
    eager, compiled = (column(tmp_path / name / "train.csv", "loss") for name in ("false", "true"))
    assert len(eager) == 3 and compiled == pytest.approx(eager, rel=2e-3)
    load_model(tmp_path / "true" / "model.safetensors")


@pytest.mark.slow
@needs_compiler
def test_pretraining_compiled_is_the_same(repo, views_dir, tmp_path, own_cache):
    changes = [f"data.chips={views_dir}", "steps=3", "log_every=1", "probe.every=0", "dino.gram.weight=0",
               "views.locals=0", "final.share=0"]  # fmt: skip
    for name in ("false", "true"):
        torch._dynamo.reset()
        settings = load_settings(
            PretrainSettings, repo / "configs/pretrain/smoke.yaml", [*changes, f"compile={name}"]
        )
        pretrain(settings, tmp_path / name)
    eager, compiled = (column(tmp_path / name / "log" / "metrics.csv", "loss") for name in ("false", "true"))
    assert len(eager) == 3 and compiled == pytest.approx(eager, rel=2e-3)
