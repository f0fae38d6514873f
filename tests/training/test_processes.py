"""Several processes train as one: the same weights everywhere, those of one process with the whole batch."""

from __future__ import annotations

import csv
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from canopy.chips.data import ChipBatches
from canopy.config import load_settings
from canopy.errors import ConfigError, DataError
from canopy.training.data import batches, open_data
from canopy.training.fit import finetune
from canopy.training.run_folder import from_all, longest, mean_of_processes, share_of
from canopy.training.settings import FinetuneSettings

# No batch norms, which see one process's images, and nothing drawn at random by process.
PLAIN = ("model.encoder.stem=[]", "model.decoder.detail=false", "model.decoder.unit_norm=false",
         "model.encoder.drop_path=0", "loss.ranked=0.1", "steps=4")  # fmt: skip
SCRIPT = """
import sys
from pathlib import Path
import torch
import canopy.training.fit as fit
from canopy.config import load_settings
from canopy.training.settings import FinetuneSettings
config, run, resume, overrides = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "resume", sys.argv[4:]
save = fit._Run._save
def noting(self, module):
    save(self, module)
    torch.save(module.state_dict(), run.with_name(f"{run.name}-rank{module.global_rank}.pt"))
fit._Run._save = noting
fit.finetune(load_settings(FinetuneSettings, config, overrides), run, resume=resume)
"""


def settings(config, *overrides) -> FinetuneSettings:
    return load_settings(FinetuneSettings, config, [*PLAIN, *overrides])


def test_one_process_is_all():
    x = torch.tensor(3.0)
    assert mean_of_processes(x) is x and longest(2.5, x.device) == 2.5
    assert from_all([1, 2]) == [1, 2] and list(share_of(3)) == [0, 1, 2]


def test_processes_share_a_batch(config):
    data = open_data(settings(config).data, 0.5)

    def stream(batch, rank=0, world=1) -> ChipBatches:
        made = batches(settings(config, f"batch={batch}"), data)
        made.split(rank, world)
        return made

    for number in (0, 5):
        whole = stream(4).make(number)
        parts = [stream(2, rank, 2).make(number) for rank in (0, 1)]
        for one, two in zip(whole, zip(*parts, strict=True), strict=True):
            assert torch.equal(one, torch.cat(two))
    with pytest.raises(DataError, match="1 processes, this run has 2"):
        stream(2, 0, 2).load_state_dict(stream(2).state_dict())


def test_several_devices_must_be_named(config):
    for wrong in ("device=auto", "device=cuda:1"):
        with pytest.raises(ConfigError, match="device=cuda or device=cpu"):
            settings(config, "devices=2", wrong)


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(tmp_path, config, shards):
    torch.set_num_threads(1)
    one, two = tmp_path / "one", tmp_path / "two"
    finetune(settings(config, "batch=4"), one)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def together(how: str, *more: str) -> None:
        done = subprocess.run(
            [sys.executable, str(script), str(config), str(two), how, *PLAIN, "devices=2", *more],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-1500:]

    together("new")
    first, second = (torch.load(tmp_path / f"two-rank{r}.pt", weights_only=True) for r in (0, 1))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    alone = torch.load(one / "last.ckpt", weights_only=True)["state_dict"]
    assert first.keys() == alone.keys()
    for name, value in alone.items():
        np.testing.assert_allclose(first[name], value, rtol=2e-4, atol=2e-5, err_msg=name)
    for name in ("train.csv", "val.csv"):  # written once, by the first; metrics are those of both
        with (one / name).open() as a, (two / name).open() as b:
            left, right = list(csv.DictReader(a)), list(csv.DictReader(b))
        assert len(left) == len(right)
        for x, y in zip(left, right, strict=True):
            for key in x.keys() & {"step", "loss", "mae_m", "gradient", "grad_norm", "n", "bias_m"}:
                assert float(x[key]) == pytest.approx(float(y[key]), rel=2e-3, abs=2e-3), (name, key)
    together("resume", "steps=6")
    state = torch.load(two / "last.ckpt", weights_only=True)
    assert state["global_step"] == 6 and state["canopy"]["stream"]["world"] == 2
    assert (two / "model.safetensors").is_file()
