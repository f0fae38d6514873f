"""The published sizes themselves, with random weights: exact heights, and conversion in little memory.

Slow (minutes, 4 GB of memory; 5.2 GB of disk, given back at once):
`pytest -m slow tests/models/test_published_full.py -s`.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from canopy.models.checkpoint import load_model

_spec = importlib.util.spec_from_file_location("originals", Path(__file__).with_name("originals.py"))
originals = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(originals)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc"),
]
V1 = {
    "v1-large": (1024, 24, (128, 256, 512, 1024), 16, (4, 11, 17, 23)),
}
MEMORY_TIMES_FILE = 3.6
DISK_BYTES = 5_500_000_000
# In a process of its own; VmHWM is the most memory it ever held, mapped pages of the input included.
_CONVERT = """
import json, sys
from canopy.models.published import convert
done = convert(sys.argv[1], sys.argv[2], backbone=sys.argv[3] if len(sys.argv) > 3 else None)
line = next(l for l in open("/proc/self/status") if l.startswith("VmHWM"))
print(json.dumps({"found": done.recognised.found, "peak": int(line.split()[1]) * 1024}))
"""


@pytest.fixture(autouse=True)
def room(tmp_path: Path) -> None:
    """A full disk is this test's one failure, and not the next hundred tests'."""
    free = shutil.disk_usage(tmp_path).free
    if free < DISK_BYTES:
        pytest.fail(
            f"{tmp_path}: {free / 1e9:.1f} GB free, {DISK_BYTES / 1e9:.1f} needed: set TMPDIR to another disk"
        )


def _convert(out: Path, *inputs: Path) -> dict[str, object]:
    command = [sys.executable, "-c", _CONVERT, str(inputs[0]), str(out), *map(str, inputs[1:])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    size = sum(path.stat().st_size for path in inputs)
    print(f"{report['found']}: {size / 1e9:.2f} GB, peak memory {report['peak'] / size:.2f} x the file")
    assert report["peak"] <= MEMORY_TIMES_FILE * size
    return report


def _images() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.rand(1, 3, side, side, generator=generator) for side in (256, 448)]


def _compare(path: Path, wanted: list[torch.Tensor]) -> None:
    model = load_model(path)
    for rgb, heights in zip(_images(), wanted, strict=True):
        with torch.inference_mode():
            worst = float((model(rgb) - heights).abs().max())
        print(f"  {rgb.shape[-1]} px: at most {worst:.1e} m apart; heights vary by {heights.std():.2f} m")
        assert worst < 1e-3 and heights.std() > 0.1


@pytest.mark.parametrize("name", V1)
def test_v1(name: str, tmp_path: Path) -> None:
    dim, depth, post, heads, taps = V1[name]
    torch.save({"state_dict": originals.v1_state(dim, depth, post)}, tmp_path / "a.pth")
    gc.collect()
    assert _convert(tmp_path / "m.safetensors", tmp_path / "a.pth")["found"] == f"v1, plain: {name}"
    state = torch.load(tmp_path / "a.pth", mmap=True, weights_only=True)["state_dict"]
    wanted = [originals.v1_forward(state, rgb, heads, taps) for rgb in _images()]
    _compare(tmp_path / "m.safetensors", wanted)


def test_v2(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    backbone, head = originals.v2_states(1024, 24, 16, (128, 256, 512, 1024))
    assert len(head) == 68 and sum(v.numel() for v in head.values()) == 33_747_200
    torch.save(backbone, tmp_path / "b.pth")
    torch.save(head, tmp_path / "h.pth")
    found = _convert(tmp_path / "m.safetensors", tmp_path / "h.pth", tmp_path / "b.pth")["found"]
    assert found == "v2, original backbone and head: v2-large"
    for name in ("b.pth", "h.pth"):  # from here on in memory only: five copies would fill a small disk
        (tmp_path / name).unlink()
    settings = transformers.CHMv2Config().backbone_config.to_dict()
    settings |= {"key_bias": False, "layer_norm_eps": 1e-5}
    with torch.device("meta"):
        judge = transformers.CHMv2ForDepthEstimation(transformers.CHMv2Config(backbone_config=settings))
    assert sum(p.numel() for p in judge.parameters()) == 336_876_800
    judge = transformers.CHMv2ForDepthEstimation(transformers.CHMv2Config(backbone_config=settings)).eval()
    judge.load_state_dict(originals.hub_state(backbone, head), strict=True)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (originals.MEAN, originals.STD))
    with torch.inference_mode():
        wanted = [judge((rgb - mean) / std).predicted_depth[:, None] for rgb in _images()]
    _compare(tmp_path / "m.safetensors", wanted)
