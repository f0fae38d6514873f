"""Targets are judged by what the benchmarks wrote."""

from __future__ import annotations

import pytest


def row(way: str, ratio: float) -> dict:
    return {"way": way, "what": way, "x loop": 0.9, "x inside": ratio, "cpu": 2.0, "/model": 1.01}


@pytest.mark.parametrize(("ratio", "met"), [(1.39, "no"), (1.41, "yes")])
def test_faster_than_the_loop(script, ratio, met):
    ways = [row("torch", 1.1), row("openvino", ratio), row("loop", 1.0)]
    found = {"throughput": {"settings": {}, "results": [{"model": "large", "side_px": 640, "rows": ways}]}}
    judged = {one["target"]: one for one in script("targets").judge(found)}
    first = judged["whole raster on CPU, ViT-L fp32, against the eager loop"]
    assert first["met"] == met and f"{ratio:.2f}x: openvino" in first["measured"]
    # No int8 was run: it is neither met nor missed.
    assert judged["whole raster on CPU, ViT-L int8, against dynamic int8 in the loop"]["met"] == "-"


@pytest.mark.parametrize(("growth", "met"), [(0.049, "yes"), (0.051, "no"), (-0.1, "no")])
def test_memory(script, growth, met):
    found = {"memory": {"settings": {}, "results": {"growth": growth, "sizes": {"5000": {}, "20000": {}}}}}
    judged = {one["by"]: one for one in script("targets").judge(found)}
    assert judged["benchmarks/memory.py"]["met"] == met


def test_seams_count_at_little_waste_alone(script):
    lattice = {"lattice": "256/160", "waste": 2.56, "step_p999_m": 0.01, "margin": 6}
    wide = {"lattice": "512/448", "waste": 1.306, "step_p999_m": 0.12, "margin": 8}
    found = {"seams": {"settings": {}, "results": {"lattices": [lattice, wide]}}}
    judged = {one["by"]: one for one in script("targets").judge(found)}
    assert (
        judged["benchmarks/seams.py"]["met"] == "no"
        and "512/448" in judged["benchmarks/seams.py"]["measured"]
    )


@pytest.mark.parametrize(("device", "met"), [("CPU", "-"), ("a card", "yes")])
def test_a_gpu_is_judged_on_a_gpu_alone(script, device, met):
    passes = [{"% GEMM": share, "precision": "bf16", "mode": "graph"} for share in (12.0, 31.0)]
    result = {"model": "large", "passes": passes, "map": []}
    found = {"gpu": {"settings": {"name": device}, "results": [result]}}
    judged = {one["target"]: one for one in script("targets").judge(found)}
    assert judged["share of the GPU's measured matrix products"]["met"] == met


@pytest.mark.parametrize(("wall", "met"), [(1.049, "yes"), (1.051, "no")])
def test_the_worst_source_decides_over_the_pipeline(script, wall, met):
    rows = [
        {"source": source, "wall": ratio, "cpu": 1.02, "in job": 1.03, "Mpx": 4.2}
        for source, ratio in (("jpeg", 1.01), ("http", wall), ("deflate", 0.99))
    ]
    found = {"pipeline": {"settings": {}, "results": {"rows": rows}}}
    judged = {one["by"]: one for one in script("targets").judge(found)}["benchmarks/pipeline.py"]
    assert judged["met"] == met and judged["measured"].startswith(f"{wall:.3f} (http")
