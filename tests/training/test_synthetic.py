"""The whole chain on the procedural forest: pretrain, fine-tune, score on scenes never seen.

`benchmarks/synthetic_training.py` does it with enough steps to come near a quarter of the constant's error.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch


@pytest.fixture
def bench(repo):
    spec = importlib.util.spec_from_file_location(
        "synthetic_training", repo / "benchmarks" / "synthetic_training.py"
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.set_num_threads(1)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["dinov2", "mae"])
def test_pretrained_and_tuned_it_beats_the_constant_on_unseen_scenes(bench, tmp_path, objective):
    result = bench.run(tmp_path, 10, 120, 2, objective)
    assert result["share_of_constant"] < 0.6 and result["objective"] == objective


def test_test_scenes_are_other_scenes(bench):
    seeds = [set(numbers) for numbers, _ in bench.SPLITS.values()]
    assert not (seeds[0] & seeds[1] or seeds[0] & seeds[2] or seeds[1] & seeds[2])
