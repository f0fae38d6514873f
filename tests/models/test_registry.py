"""Models by name: embedded, downloaded once and converted, or refused in one clear line."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
import yaml
from safetensors.torch import save_file

from canopy.errors import CheckpointError, ConfigError, DataError, FetchError
from canopy.models.foreign import tables
from canopy.models.published import convert
from canopy.models.registry import load_model, published_models, resolve_model
from canopy.runtime import bundled_dir

PRETENDED = ["v1-pretended", 2, [0, 1, 2, 3]]
COMMON = {"title": "A model", "licence": "Apache-2.0", "source": "a paper", "size_gb": 0.01}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own; and the pretended model is a published size, so that no --config is needed."""
    monkeypatch.setitem(tables()["releases"]["v1"]["sizes"], "64x4", PRETENDED)
    monkeypatch.setenv("CANOPY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def original(originals, tmp_path: Path) -> bytes:
    """A v1 checkpoint with random weights, as its publisher would serve it."""
    torch.manual_seed(0)
    torch.save({"state_dict": originals.v1(64, 4, (8, 16, 32, 64), 16)}, tmp_path / "a.pth")
    return (tmp_path / "a.pth").read_bytes()


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`table(**entry)` makes a models.yaml with this entry, named `m`, and points canopy at it."""

    def make(**entry: Any) -> None:
        (tmp_path / "manifests").mkdir(exist_ok=True)
        text = yaml.safe_dump({"models": {"m": COMMON | entry}})
        (tmp_path / "manifests" / "models.yaml").write_text(text)
        monkeypatch.setenv("CANOPY_MANIFESTS", str(tmp_path / "manifests"))

    return make


def test_the_shipped_table_is_valid_and_says_how_to_get_each() -> None:
    models = published_models()
    assert {"v1-huge", "v1-large", "v2"} <= set(models)
    assert all(models[name].licence == "Apache-2.0" for name in models if name.startswith("v1"))
    assert "DINOv3" in models["v2"].licence and "granted by hand" in models["v2"].facts()["how"]
    assert models["v1-large"].facts()["commercial_use"] == "yes"
    assert models["v2"].facts()["commercial_use"] == "ask" and "read it before" in models["v2"].notes
    assert all(entry.origin.startswith(("https://", "hf://")) for entry in models.values())


@pytest.mark.parametrize(
    "entry",
    [{}, {"files": [{"url": "ftp://x/y"}]}, {"hub": "facebook/x"}, {"hub": "hf://a/b", "colour": "green"}],
    ids=["no origin", "not http", "no hf://", "unknown key"],
)
def test_a_wrong_table_is_refused(entry: dict, table: Callable[..., None]) -> None:
    table(**entry)
    with pytest.raises(ConfigError, match=r"models\.yaml"):
        published_models()


def test_first_use_downloads_converts_and_says_the_terms(
    server: Any, table: Callable[..., None], cache: Path, original: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    url = server.put("/models/SSL.pth", original)
    server.cut("/models/SSL.pth", times=2, after=len(original) // 5)
    table(files=[{"url": url, "sha256": hashlib.sha256(original).hexdigest()}])
    with caplog.at_level(logging.INFO, logger="canopy"):
        logging.getLogger("canopy").propagate = True
        model = load_model("m")
    said = caplog.text
    assert "licence: Apache-2.0" in said and str(cache / "models") in said and url in said
    assert model.card["name"] == "v1-pretended" and model.card["source"] == url
    asked = len(server.log)
    assert resolve_model("m") == model.path and len(server.log) == asked, "the second use asks nobody"


V1 = {
    "v1-huge": "SSLhuge_satellite.pth", "v1-huge-compressed": "compressed_SSLhuge.pth",
    "v1-huge-aerial": "compressed_SSLhuge_aerial.pth", "v1-large": "compressed_SSLlarge.pth",
}  # fmt: skip


def quantised(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Weights of a published layout as dynamic quantisation stores them: packed 8-bit linear layers."""
    stored: dict[str, Any] = {}
    for name, tensor in state.items():
        base, _, last = name.rpartition(".")
        if re.search(r"blocks\.\d+\.(attn|mlp)\.", name):
            if last == "weight":
                weight = torch.quantize_per_tensor(tensor, float(tensor.abs().max()) / 127, 0, torch.qint8)
                packed, layer = f"{base}._packed_params", (weight, state[f"{base}.bias"])
                stored |= {f"{packed}.dtype": torch.qint8, f"{packed}._packed_params": layer}
                stored |= {f"{base}.scale": torch.tensor(1.0), f"{base}.zero_point": torch.tensor(0)}
        else:
            stored[name] = tensor
    return stored


@pytest.fixture
def mirror(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The bucket on this machine, with its real paths: the shipped manifests, but for the host's name."""
    shutil.copytree(bundled_dir("data_manifests"), tmp_path / "mirrored")
    for path in tmp_path.glob("mirrored/**/*.yaml"):
        path.write_text(path.read_text().replace("https://dataforgood-fb-data.s3.amazonaws.com", server.url))
    monkeypatch.setenv("CANOPY_MANIFESTS", str(tmp_path / "mirrored"))
    return server


@pytest.fixture
def image(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(1, 255, (3, 256, 256), dtype=np.uint8)
    place = rasterio.Affine(0.5, 0, 310_000, 0, -0.5, 4_170_000)
    with rasterio.open(
        tmp_path / "image.tif", "w", driver="GTiff", width=256, height=256, count=3, dtype="uint8",
        crs="EPSG:32617", transform=place, photometric="RGB",
    ) as out:  # fmt: skip
        out.write(pixels)
    return tmp_path / "image.tif"


def run_cli(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    from canopy.cli.main import main

    monkeypatch.setattr(sys, "argv", ["canopy", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize("name", V1)
def test_each_published_v1_is_fetched_resumed_converted_once_and_mapped(
    name: str, mirror: Any, originals: Any, image: Path, cache: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    torch.manual_seed(len(name))
    state = originals.v1(64, 4, (8, 16, 32, 64), 16)
    torch.save(quantised(state) if "compressed" in V1[name] else {"state_dict": state}, tmp_path / "w.pth")
    path = f"/forests/v1/models/saved_checkpoints/{V1[name]}"
    mirror.put(path, (tmp_path / "w.pth").read_bytes())
    mirror.cut(V1[name], times=1, after=50_000)
    model = load_model(name)
    asked = [first for _, seen, first in mirror.log if seen == path]
    assert asked[0] == 0 and len(asked) == 2 and asked[1] > 0, "a cut download goes on where it stopped"
    assert model.path is not None and model.path.parent == cache / "models" / "converted"
    made = model.path.stat().st_mtime_ns
    if name == "v1-large":
        out = tmp_path / "chm.tif"
        assert run_cli(monkeypatch, "predict", image, "--model", name, "--backend", "torch", "-o", out) == 0
        with rasterio.open(out) as chm:
            assert chm.tags()["CANOPY_MODEL_SHA256"] == model.sha256
            assert chm.read(1, masked=True).count() == 256 * 256
    assert resolve_model(name) == model.path and model.path.stat().st_mtime_ns == made
    assert len(mirror.log) == 2, "the second use asks nobody"


_AT_ONCE = f"""
import sys
from canopy.models.foreign import tables
from canopy.models.registry import resolve_model
tables()["releases"]["v1"]["sizes"]["64x4"] = {PRETENDED}
print("ready", flush=True)
sys.stdin.readline()
print(resolve_model("v1-large"), flush=True)
"""


def test_two_processes_that_want_one_model_at_once_make_it_once(
    mirror: Any, original: bytes, cache: Path, repo: Path
) -> None:
    mirror.put(f"/forests/v1/models/saved_checkpoints/{V1['v1-large']}", original)
    environment = os.environ | {"PYTHONPATH": str(repo), "NO_PROXY": "127.0.0.1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", _AT_ONCE], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]  # fmt: skip
    assert [process.stdout.readline() for process in running] == ["ready\n"] * 2
    for process in running:
        process.stdin.write("go\n")
        process.stdin.flush()
    done = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], done
    assert done[0][0] == done[1][0] and mirror.asked("compressed_SSLlarge") == 1
    assert [p.name for p in (cache / "models" / "converted").iterdir()] == [Path(done[0][0].strip()).name]


def test_wrong_content_is_discarded_and_refusals_pass(
    server: Any, table, original: bytes, cache: Path
) -> None:
    table(files=[{"url": server.put("/m.pth", original), "sha256": "0" * 64}])
    with pytest.raises(DataError, match="sha256"):
        resolve_model("m")
    assert not list((cache / "models" / "m").glob("m.pth*"))
    server.fail("/m.pth", times=9, status=403)
    with pytest.raises(FetchError, match="403"):
        resolve_model("m")


def test_files_are_told_apart_by_content(cache: Path, tmp_path: Path, original: bytes) -> None:
    (tmp_path / "named.safetensors").write_bytes(original)  # torch itself would believe the name
    made = resolve_model(tmp_path / "named.safetensors")
    assert made.parent == cache / "models" / "converted"
    modified = made.stat().st_mtime_ns
    assert resolve_model(tmp_path / "named.safetensors") == made and made.stat().st_mtime_ns == modified
    done = convert(tmp_path / "named.safetensors", tmp_path / "ours.pth")
    assert resolve_model(tmp_path / "ours.pth") == tmp_path / "ours.pth"
    assert load_model(tmp_path / "ours.pth").sha256 == done["sha256"]
    (tmp_path / "short").write_bytes((tmp_path / "ours.pth").read_bytes()[:500])
    (tmp_path / "stub").write_bytes(b"abc")
    for name in ("short", "stub"):
        with pytest.raises(CheckpointError, match="truncated"):
            load_model(tmp_path / name)


def test_unknown_names_and_addresses(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"did you mean 'v1-huge'.*one of: default"):
        resolve_model("v1-hug")
    with pytest.raises(CheckpointError, match="hf://owner/name"):
        resolve_model("hf://only-one-part")
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        resolve_model(tmp_path)


# The hub's library reads HF_ENDPOINT when it is imported, so this runs in its own process.
_HUB = f"""
import sys
from canopy.errors import CanopyError
from canopy.models.foreign import tables
from canopy.models.registry import resolve_model
tables()["releases"]["v1"]["sizes"]["64x4"] = {PRETENDED}
for address in sys.argv[1:]:
    try:
        print("path", resolve_model(address))
    except CanopyError as error:
        print("error", error.exit_code, error)
"""


def test_the_hub_is_asked_through_its_own_library(server: Any, originals, tmp_path: Path, repo: Path) -> None:
    save_file(originals.v1(64, 4, (8, 16, 32, 64), 16), tmp_path / "w")
    content, commit = (tmp_path / "w").read_bytes(), "a" * 40

    def answer(status: int, body: Any, **headers: str) -> Callable:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return lambda *_: (status, {"Content-Type": "application/json", **headers}, data)

    file = {"type": "file", "path": "model.safetensors", "size": len(content), "oid": "b" * 40}
    tag = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit}
    for name in ("open", "gated"):
        info = {"id": f"owner/{name}", "sha": commit, "private": False, "gated": False, "tags": [],
                "downloads": 0, "likes": 0, "siblings": [{"rfilename": "model.safetensors"}]}  # fmt: skip
        for where in ("main", commit):
            server.routes[f"/api/models/owner/{name}/revision/{where}"] = answer(200, info)
            server.routes[f"/api/models/owner/{name}/tree/{where}"] = answer(200, [file])
            server.routes[f"/owner/{name}/resolve/{where}/model.safetensors"] = (
                answer(200, content, **tag) if name == "open"
                else answer(403, {}, **{"X-Error-Code": "GatedRepo", "X-Error-Message": "restricted"})
            )  # fmt: skip
    server.routes["/api/models/owner/gone/revision/main"] = answer(
        401, {}, **{"X-Error-Code": "RepoNotFound"}
    )
    environment = {k: v for k, v in os.environ.items() if k[:3] != "HF_" and "proxy" not in k.lower()}
    environment |= {
        "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(repo),
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    words = [sys.executable, "-c", _HUB, *(f"hf://owner/{name}" for name in ("open", "gated", "gone"))]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found, gated, gone = done.stdout.strip().splitlines()
    model = load_model(found.removeprefix("path "))
    assert model.card["source"] == "hf://owner/open" and model.card["name"] == "v1-pretended"
    assert gated.startswith("error 2 https://huggingface.co/owner/gated: these weights are gated")
    assert "HF_TOKEN" in gated
    assert gone.startswith("error 2 hf://owner/gone: no such model on the hub")
