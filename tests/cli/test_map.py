"""`canopy map` at the command line: planning and refusals; tests/behaviour has what a run makes."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def words(make_image, model_file) -> list[object]:
    """A region of four tiles."""
    return [
        "map", make_image(), "--model", model_file, "--device", "cpu", "--grid", "utm", "--zoom", 20,
        "--threads", 1, "-o", "run",
    ]  # fmt: skip


def test_what_a_region_will_cost(canopy, words, tmp_path) -> None:
    plan = canopy(*words, "--dry-run", "--price", 3.6, "--json", "--workers", 2)
    assert plan.code == 0, plan.err
    cost = json.loads(plan.out)
    assert cost["tiles"] == 4 and cost["crops"] > 4 and cost["pixels"] == 12_000
    assert cost["money"] == pytest.approx(3.6 * cost["worker_hours"])
    assert cost["hours"] == pytest.approx(cost["worker_hours"] / 2)
    assert cost["imagery_bytes"] > 3 * 12_000
    assert [path.name for path in tmp_path.iterdir()] == ["image.tif"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--tile-px", 1000), "power of two"),
        (("--crs", "EPSG:4326"), "projected"),
        (("--shard", "5/3"), "I/N"),
    ],
)
def test_bad_options(refused, words, more, message: str) -> None:
    assert message in refused(*words, *more)


def test_a_folder_without_a_run(refused) -> None:
    for words in (("--status", "nowhere"), ("-o", "nowhere", "--resume"), ()):
        refused("map", *words)
