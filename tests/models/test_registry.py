"""Models by name: embedded, downloaded once and converted, or refused in one clear line."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from canopy.errors import CheckpointError, ConfigError, DataError, FetchError
from canopy.models.foreign import tables
from canopy.models.published import convert
from canopy.models.registry import load_model, published_models, resolve_model

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
    assert "DINOv3" in models["v2"].licence and "https://" in models["v2"].facts()["how"]
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
