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
