"""The matrix of runs: what it would do, what it skips, what it writes."""

from __future__ import annotations

import csv
import json

import pytest
import torch

from canopy.errors import ConfigError
from canopy.training.experiments import jobs, load_matrix, run_matrix

MATRIX = """
splits: [val, test]
set: {steps: 1, validate_every: 1, loss: {l1: 0.1}}
shares: [1.0, 0.25]
seeds: [0, 1]
runs:
  - {name: mean, baseline: constant}
  - {name: ours, config: tiny.yaml, set: {loss: {silog: 0.2}}}
  - {name: begun, config: tiny.yaml, set: {init_from: "{encoder}"}, shares: [1.0], seeds: [0]}
"""


@pytest.fixture
def matrix(tmp_path):
    path = tmp_path / "matrix.yaml"
    path.write_text(MATRIX)
    return path


def test_order_and_overrides(matrix):
    found = list(jobs(load_matrix(matrix, []), {"encoder": "runs/e.safetensors"}))
    assert [job.id for job in found] == [
        "mean-100pct-s0", "ours-100pct-s0", "begun-100pct-s0", "mean-25pct-s0", "ours-25pct-s0",
        "ours-100pct-s1", "ours-25pct-s1",
    ]  # fmt: skip
    assert found[1].overrides == (
        "steps=1", "validate_every=1", "loss.l1=0.1", "loss.silog=0.2", "seed=0", "data.label_share=1.0",
    )  # fmt: skip
    assert 'init_from="runs/e.safetensors"' in found[2].overrides
    assert "begun-100pct-s0" not in [job.id for job in jobs(load_matrix(matrix, []), {})]
    assert [job.seed for job in jobs(load_matrix(matrix, ["seeds=[5]"]), {})] == [5, 5, 5, 5]


def test_a_line_is_left_out_wherever_in_a_text_its_variable_stands(matrix):
    line = "runs=[{name: a, config: tiny.yaml, set: {init_from: 'runs/{x}/e-{y}.safetensors'}}]"
    found = load_matrix(matrix, [line, "seeds=[0]", "shares=[1.0]"])
    assert list(jobs(found, {})) == list(jobs(found, {"x": "1"})) == []
    (job,) = jobs(found, {"x": "1", "y": "{2}"})  # what a variable stands for is taken as it is
    assert 'init_from="runs/1/e-{2}.safetensors"' in job.overrides
    everywhere = load_matrix(matrix, ["set={init_from: 'runs/{x}'}", "seeds=[0]", "shares=[1.0]"])
    names = [job.line.name for job in jobs(everywhere, {"encoder": "e"})]
    assert names == ["begun"]  # which has its own value in its place


def test_runs_are_scored_once_and_failures_do_not_stop_the_rest(
    matrix, config, shards, tmp_path, monkeypatch
):
    torch.set_num_threads(1)
    wanted = load_matrix(matrix, ["seeds=[0]", "shares=[1.0]"])
    out = tmp_path / "out"
    failed = run_matrix(wanted, tmp_path, shards, out, {"encoder": str(tmp_path / "none.safetensors")})
    assert failed == ["begun-100pct-s0"]
    with (out / "results.csv").open(newline="") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["mean-100pct-s0", "ours-100pct-s0"]
    ours = rows["ours-100pct-s0"]
    assert (
        ours["steps"] == "1"
        and float(ours["test mae_m"]) > 0
        and float(rows["mean-100pct-s0"]["val mae_m"]) > 0
    )
    assert "loss.silog=0.2" in ours["command"] and str(tmp_path) not in (out / "results.csv").read_text()
    scores = json.loads((out / "ours-100pct-s0" / "scores.json").read_text())["scores"]
    assert set(scores) == {"val", "test"} and "bias_20-30_m" in scores["test"]["all"]
    text = (out / "results.md").read_text()
    assert "ours-100pct-s0" in text and "random weights" in text and "val: site0" in text

    monkeypatch.setattr("canopy.training.experiments.finetune", lambda *a, **k: pytest.fail("ran again"))
    monkeypatch.setattr("canopy.training.experiments.fit_baselines", lambda *a, **k: pytest.fail("ran again"))
    run_matrix(load_matrix(matrix, ["seeds=[0]", "shares=[1.0]"]), tmp_path, shards, out, {})


def test_a_model_that_is_there_is_scored_as_it_is(matrix, config, shards, tmp_path):
    torch.set_num_threads(1)
    made = tmp_path / "out" / "ours-100pct-s0" / "model.safetensors"
    run_matrix(load_matrix(matrix, ["seeds=[0]", "shares=[1.0]"]), tmp_path, shards, tmp_path / "out", {})
    lines = ["runs=[{name: there, model: '{made}'}, {name: left-out, model: '{other}'}]"]
    wanted = load_matrix(matrix, lines)
    assert run_matrix(wanted, tmp_path, shards, tmp_path / "again", {"made": str(made)}) == []
    with (tmp_path / "again" / "results.csv").open(newline="") as file:
        again = list(csv.DictReader(file))
    with (tmp_path / "out" / "results.csv").open(newline="") as file:
        ours = {row["run"]: row for row in csv.DictReader(file)}["ours-100pct-s0"]
    # Once, whatever the seeds and shares; nothing of the folder's name gets into the table.
    assert [row["run"] for row in again] == ["there-100pct-s0"]
    assert again[0]["val mae_m"] == ours["val mae_m"] and again[0]["parameters"] == ours["parameters"]
    assert again[0]["command"] == "model model.safetensors as it is"


def test_folds_of_places_are_scored_on_what_they_left_out(config, shards, tmp_path):
    torch.set_num_threads(1)
    text = """
splits: [val]
set: {steps: 1, validate_every: 1}
folds: {a: [site0], b: [site1]}
runs:
  - {name: mean, baseline: constant}
  - {name: ours, config: tiny.yaml}
"""
    (tmp_path / "places.yaml").write_text(text)
    matrix = load_matrix(tmp_path / "places.yaml", [])
    ids = [job.id for job in jobs(matrix, {})]
    assert ids == ["mean-a-100pct-s0", "ours-a-100pct-s0", "mean-b-100pct-s0", "ours-b-100pct-s0"]
    assert run_matrix(matrix, tmp_path, shards, tmp_path / "out", {}) == []
    for name, site in zip(ids, ["site0", "site0", "site1", "site1"], strict=True):
        found = json.loads((tmp_path / "out" / name / "scores.json").read_text())
        assert set(found["scores"]) == {"val"} and site in found["scores"]["val"]
        assert len([k for k in found["scores"]["val"] if k.startswith("site")]) == 1
    # The constant is the mean of the other site's training chips, and so differs between the folds.
    text = (tmp_path / "out" / "results.md").read_text()
    table = text.split("## Places left out")[1].split("##")[0]
    assert "| mean-100pct-s0 |" in table and "| ours-100pct-s0 |" in table and "- |" not in table
    assert "'data.val_sites=[site0]'" in text


def test_wrong_matrices(matrix):
    with pytest.raises(ConfigError, match="either a config, a baseline or a model"):
        load_matrix(matrix, ["runs=[{name: a}]"])
    with pytest.raises(ConfigError, match="two runs are called 'a'"):
        load_matrix(matrix, ["runs=[{name: a, baseline: ridge}, {name: a, baseline: constant}]"])


def test_the_shipped_matrices_name_real_configs(repo):
    for path in sorted((repo / "configs" / "experiments").glob("*.yaml")):
        for line in load_matrix(path, []).runs:
            assert not line.config or (path.parent / line.config).is_file()
