"""The benchmarks of the engine (pipeline, seams, GPU) at a size of nothing: structure and arithmetic."""

from __future__ import annotations

import json
import threading
import urllib.request

import numpy as np
import pytest


def results(folder, name: str):
    return json.loads((folder / f"{name}.json").read_text())["results"]


# ---- pipeline -----------------------------------------------------------------------------------
def test_pipeline(script, tiny_model, tmp_path, monkeypatch):
    from canopy.geo.cog import CogWriter

    pipeline = script("pipeline")
    monkeypatch.setattr(CogWriter, "close", CogWriter.close)  # the benchmark wraps it for its process
    monkeypatch.setattr(pipeline.common, "alone", lambda _, case: pipeline.run_case(case))
    arguments = ["--model", str(tiny_model), "--size", "300", "--backend", "torch", "--delay-ms", "1"]
    pipeline.main([*arguments, "--out", str(tmp_path)])
    rows = {row["source"]: row for row in results(tmp_path, "pipeline")["rows"]}
    assert set(rows) == {"jpeg", "deflate", "http"}
    for row in rows.values():
        assert row["Mpx"] == pytest.approx(0.09) and row["crops"] > 1
        assert row["wall"] > 0 and row["cpu"] > 0 and row["in job"] > 0 and row["COG s"] > 0


def test_the_slow_server_answers_ranges_late(script, tmp_path):
    pipeline = script("pipeline")
    (tmp_path / "a.bin").write_bytes(bytes(range(100)))
    server = pipeline.Slow(tmp_path, delay_s=0.0, rate=1000.0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    ask = urllib.request.Request(server.url("a.bin"), headers={"Range": "bytes=10-59"})
    with urllib.request.urlopen(ask) as answer:
        assert answer.status == 206 and answer.read() == bytes(range(10, 60))
    clock = pipeline.common.Clock()
    with urllib.request.urlopen(server.url("a.bin")) as answer:
        assert answer.read() == bytes(range(100))
    assert clock.read()["wall_s"] >= 0.1  # 100 bytes at 1000 a second
    assert (server.requests, server.sent) == (2, 150)
    server.shutdown()
    server.server_close()


# ---- seams --------------------------------------------------------------------------------------
def test_a_constant_difference_is_spread_over_the_ramp(script):
    seams = script("seams")
    found = np.full((3, 64, 16), 2.0)
    for margin in (0, 2, 6):
        judged = seams.judge(found, margin)
        ramp = 16 - 2 * margin
        assert judged["mean_m"] == judged["p999_m"] == judged["level_m"] == 2.0
        # sin^2 is steepest in its middle: pi / 2 over the ramp's length.
        assert judged["step_max_m"] == pytest.approx(2.0 * np.pi / 2 / ramp, rel=0.05)
    wide, narrow = (seams.judge(found, margin)["step_max_m"] for margin in (0, 6))
    assert wide < narrow


def test_a_margin_takes_away_what_lies_at_the_border(script):
    seams = script("seams")
    found = np.zeros((2, 64, 16))
    found[:, :, :3] = 9.0
    assert seams.judge(found, 0)["mean_m"] > 0
    assert seams.judge(found, 4) == dict.fromkeys(seams.judge(found, 4), 0.0)
    profile = seams.by_distance(found, bins=4)
    assert [row["from_px"] for row in profile] == [0, 2, 4, 6]
    assert profile[0]["mean_m"] == 4.5 and profile[2]["mean_m"] == 0


def test_seams_of_a_network_that_sees_one_pixel_are_nothing(script):
    seams = script("seams")
    from canopy.imagery.open import open_imagery

    source = open_imagery("demo")
    grid = source.area().grid("EPSG:32619", 0.5).window(0, 0, 300, 300)
    found = seams.differences(lambda rgb: 30 * rgb[:, 1:2], source, grid, 64, 48, pairs=4)
    assert found.shape == (4, 64, 16)
    assert np.abs(found).max() == 0


def test_seams(script, tiny_model, tmp_path):
    seams = script("seams")
    seams.main([str(tiny_model), "demo", "--lattices", "64/48", "--pairs", "2", "--out", str(tmp_path)])
    found = results(tmp_path, "seams")
    assert [row["lattice"] for row in found["lattices"]] == ["64/48"] * len(seams.MARGINS)
    for row in found["lattices"]:
        assert row["waste"] == pytest.approx((64 / 48) ** 2)
        assert 0 < row["step_p999_m"] <= row["step_max_m"] <= row["p999_m"] * 1.5
    assert len(found["profiles"]["64/48"]) == 8


# ---- GPU ----------------------------------------------------------------------------------------
def test_gpu_on_a_cpu(script, tmp_path, monkeypatch):
    gpu = script("gpu")
    monkeypatch.setattr(gpu, "SECONDS", 0.1)
    arguments = "--device cpu --models tiny --modes eager --batches 2 3 --map-px 150"
    gpu.main([*arguments.split(), "--out", str(tmp_path)])
    (found,) = results(tmp_path, "gpu")
    assert [row["batch"] for row in found["passes"]] == [2, 3]
    for row in found["passes"]:
        assert row["TFLOP/s"] == pytest.approx(row["images/s"] * found["gflop"] / 1e3)
        assert row["% GEMM"] == pytest.approx(100 * row["TFLOP/s"] / row["GEMM TFLOP/s"])
    (flow,) = found["map"]
    assert flow["wall / network"] > 1 and flow["px seen"] > 1
    # A crop's place in a batch and the batch's size do not count in fp32.
    (same,) = found["same"]
    assert same["max to fp32, m"] < 1e-3 and same["by place, m"] < 1e-3 and same["by batch, m"] < 1e-3


def test_allocation(script, tiny_model, tmp_path):
    script("allocation").main([str(tiny_model), "--shapes", "1x64", "2x64", "--out", str(tmp_path)])
    rows = results(tmp_path, "allocation")
    assert [(row["batch"], row["memory"]) for row in rows] == [
        (1, "usual"), (1, "kept"), (2, "usual"), (2, "kept")
    ]  # fmt: skip
    assert all(row["user s/Mpx"] + row["system s/Mpx"] > 0 for row in rows)


# ---- heads --------------------------------------------------------------------------------------
def test_heads_share_an_encoder_and_differ_in_work(script, tmp_path, monkeypatch):
    monkeypatch.setenv("CANOPY_CACHE", str(tmp_path / "cache"))  # which the script moves
    heads = script("heads")
    arguments = ["--side", "64", "--rounds", "1", "--only", "shipped", "slim-32"]
    heads.main([*arguments, "--out", str(tmp_path)])
    rows = {row["head"]: row for row in results(tmp_path, "heads")}
    assert set(rows) == {"shipped", "slim-32"}
    encoders = {round(row["GFLOP at 256 px"] - row["of that the head"], 6) for row in rows.values()}
    assert len(encoders) == 1 and min(encoders) > 1
    assert rows["slim-32"]["of that the head"] < rows["shipped"]["of that the head"] / 2
