"""Published models by name: downloaded once, checked, pinned, converted, and refused in one clear line."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from canopy.errors import CheckpointError, ConfigError, DataError, FetchError
from canopy.models.published import convert
from canopy.models.registry import facts, is_canopy_file, load_model, published_models, resolve_model

# The one size whose heads and taps are published and which is small enough to pretend with.
TINY = {"num_heads": 2, "taps": [0, 1, 2, 3]}


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, repo: Path) -> bytes:
    """A v1 checkpoint with random weights, as its publisher would serve it."""
    originals = _load(repo / "tests" / "models" / "originals.py")
    path = tmp_path_factory.mktemp("original") / "a.pth"
    torch.save({"state_dict": originals.v1_state(64, 4, (8, 16, 32, 64), fusion=16, hidden=8)}, path)
    return path.read_bytes()


@pytest.fixture(autouse=True)
def known_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the pretended model be a published size, so that no --config is needed."""
    from canopy.models import published_tables

    monkeypatch.setitem(published_tables.KNOWN, ("v1", 64, 4), ("v1-pretended", 2, (0, 1, 2, 3)))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CANOPY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Callable[..., None]:
    """`table(name={...})` makes a models.yaml with these entries and points canopy at it."""

    def make(**entries: dict[str, Any]) -> None:
        folder = tmp_path / "manifests"
        folder.mkdir(exist_ok=True)
        common = {"title": "A model", "licence": "Apache-2.0", "source": "a paper", "size_gb": 0.01}
        models = {name.replace("_", "-"): common | entry for name, entry in entries.items()}
        (folder / "models.yaml").write_text(yaml.safe_dump({"models": models}))
        monkeypatch.setenv("CANOPY_MANIFESTS", str(folder))

    return make


def test_the_shipped_table_is_valid_and_says_how_to_get_each() -> None:
    models = published_models()
    assert {"v1-huge", "v1-large", "v2"} <= set(models)
    assert all(models[name].licence == "Apache-2.0" for name in models if name.startswith("v1"))
    assert "DINOv3" in models["v2"].licence and "https://" in facts(models["v2"])["how"]
    for name, entry in models.items():
        assert entry.origin.startswith(("https://", "hf://")), name


def test_first_use_downloads_converts_and_says_the_terms(
    server: Any, table: Callable[..., None], cache: Path, original: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    url = server.put("/models/SSL.pth", original)
    table(
        v1_test={
            "files": [{"url": url, "bytes": len(original), "sha256": hashlib.sha256(original).hexdigest()}]
        }
    )
    with caplog.at_level(logging.INFO, logger="canopy"):
        logging.getLogger("canopy").propagate = True
        model = load_model("v1-test")
    said = caplog.text
    assert "licence: Apache-2.0" in said and str(cache / "models") in said and url in said
    assert model.card["name"] == "v1-pretended" and model.card["source"] == url
    asked = len(server.log)
    again = resolve_model("v1-test")
    assert len(server.log) == asked, "the second use asks nobody"
    assert again.parent == cache / "models" / "converted" and model.sha256 is not None


def test_cut_connections_are_resumed(
    server: Any, table: Callable[..., None], original: bytes, cache: Path
) -> None:
    url = server.put("/m.pth", original)
    server.cut("/m.pth", times=3, after=len(original) // 5)
    table(m={"files": [{"url": url}]})
    resolve_model("m")
    starts = [first for _, path, first in server.log if path == "/m.pth"]
    assert starts[0] == 0 and all(later > 0 for later in starts[1:]) and len(starts) == 4
    assert (cache / "models" / "m" / "m.pth").read_bytes() == original


def test_a_first_download_is_pinned(
    server: Any, table: Callable[..., None], original: bytes, cache: Path
) -> None:
    url = server.put("/m.pth", original)
    table(m={"files": [{"url": url}]})
    path = resolve_model("m")
    pins = json.loads((cache / "models" / "m" / "pins.json").read_text())
    assert pins[url] == hashlib.sha256(original).hexdigest()
    # The original may go: the conversion is enough. Both gone, another file at the address is not accepted.
    (cache / "models" / "m" / "m.pth").unlink()
    assert resolve_model("m") == path
    path.unlink()
    server.put("/m.pth", original[:-10] + b"0123456789")
    with pytest.raises(DataError, match="sha256"):
        resolve_model("m")
    server.put("/m.pth", original)
    assert resolve_model("m") == path


@pytest.mark.parametrize(
    ("entry", "words"), [({"sha256": "0" * 64}, "sha256"), ({"bytes": 12}, r"bytes.*expected 12")]
)
def test_wrong_content_is_discarded(
    entry: dict, words: str, server: Any, table: Callable[..., None], original: bytes, cache: Path
) -> None:
    table(m={"files": [{"url": server.put("/m.pth", original), **entry}]})
    with pytest.raises(DataError, match=words):
        resolve_model("m")
    assert not list((cache / "models" / "m").glob("m.pth*"))


def test_gated_weights_are_explained_in_one_line(server: Any, table: Callable[..., None]) -> None:
    url, page = server.url + "/gated.pth", "https://example.org/terms"
    table(open={"files": [{"url": url}]}, gated={"files": [{"url": url}], "terms_at": page})
    server.fail("/gated.pth", times=9, status=403)
    with pytest.raises(CheckpointError, match=rf"{page}: these weights are gated.*HF_TOKEN") as caught:
        resolve_model("gated")
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    with pytest.raises(FetchError, match="403"):
        resolve_model("open")


def test_files_are_told_apart_by_content(cache: Path, tmp_path: Path, original: bytes, repo: Path) -> None:
    (tmp_path / "named.safetensors").write_bytes(original)  # torch itself would believe the name
    made = resolve_model(tmp_path / "named.safetensors")
    assert made.parent == cache / "models" / "converted"
    modified = made.stat().st_mtime_ns
    assert resolve_model(tmp_path / "named.safetensors") == made and made.stat().st_mtime_ns == modified
    done = convert(tmp_path / "named.safetensors", tmp_path / "ours.pth")
    assert is_canopy_file(done.path) and resolve_model(done.path) == done.path
    assert load_model(done.path).sha256 == done.sha256
    (tmp_path / "short").write_bytes(done.path.read_bytes()[:500])
    with pytest.raises(CheckpointError, match="truncated"):
        load_model(tmp_path / "short")
    (tmp_path / "stub").write_bytes(b"abc")
    with pytest.raises(CheckpointError):
        load_model(tmp_path / "stub")


def test_unknown_names_and_addresses(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"did you mean 'v1-huge'.*one of: default"):
        resolve_model("v1-hug")
    with pytest.raises(CheckpointError, match="hf://owner/name"):
        resolve_model("hf://only-one-part")
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        resolve_model(tmp_path)


def test_options_that_only_convert_has(cache: Path, tmp_path: Path, repo: Path) -> None:
    originals = _load(repo / "tests" / "models" / "originals.py")
    _, head = originals.v2_states(64, 4, 2, (8, 16, 32, 64), fusion=16, hidden=8)
    torch.save(head, tmp_path / "head.pth")
    with pytest.raises(CheckpointError, match=r"canopy models convert.*--backbone"):
        resolve_model(tmp_path / "head.pth")


@pytest.mark.parametrize(
    "entry",
    [{}, {"files": [{"url": "ftp://x/y"}]}, {"hub": "facebook/x"}, {"hub": "hf://a/b", "colour": "green"}],
    ids=["no origin", "not http", "no hf://", "unknown key"],
)
def test_a_wrong_table_is_refused(entry: dict, table: Callable[..., None]) -> None:
    table(m=entry)
    with pytest.raises(ConfigError, match=r"models\.yaml"):
        published_models()


# The hub's library reads HF_ENDPOINT when it is imported, so these run in their own process.
_HUB = """
import sys
from canopy.errors import CanopyError
from canopy.models import published_tables
from canopy.models.registry import resolve_model
published_tables.KNOWN[("v1", 64, 4)] = ("v1-pretended", 2, (0, 1, 2, 3))
try:
    print("path", resolve_model(sys.argv[1]))
except CanopyError as error:
    print("error", error.exit_code, error)
"""


def _hub_run(server: Any, folder: Path, repo: Path, address: str, token: str | None = None) -> str:
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()
    }
    environment |= {
        "HF_ENDPOINT": server.url, "HF_HOME": str(folder / "hf"), "CANOPY_CACHE": str(folder / "cache"),
        "PYTHONPATH": str(repo), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    if token:
        environment["HF_TOKEN"] = token
    command = [sys.executable, "-c", _HUB, address]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _serve_hub(server: Any, files: dict[str, bytes], token: str | None = None) -> None:
    """The few routes of the hub's API that a snapshot download asks for."""
    commit = "a" * 40
    info = {
        "id": "owner/name", "sha": commit, "private": False, "gated": "auto" if token else False, "tags": [],
        "downloads": 0, "likes": 0, "siblings": [{"rfilename": name} for name in files],
    }  # fmt: skip

    def api(path: str, query: dict, body: bytes) -> tuple[int, dict[str, str], bytes]:
        return 200, {"Content-Type": "application/json"}, json.dumps(info).encode()

    tree = [{"type": "file", "path": n, "size": len(c), "oid": "b" * 40} for n, c in files.items()]

    def listed(path: str, query: dict, body: bytes) -> tuple[int, dict[str, str], bytes]:
        return 200, {"Content-Type": "application/json"}, json.dumps(tree).encode()

    for where in ("main", commit):
        server.routes[f"/api/models/owner/name/revision/{where}"] = api
        server.routes[f"/api/models/owner/name/tree/{where}"] = listed
    for name, content in files.items():
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit}

        def give(path: str, query: dict, body: bytes, content: bytes = content, headers: dict = headers):
            if token:
                refusal = {
                    "X-Error-Code": "GatedRepo",
                    "X-Error-Message": "Access to model owner/name is restricted.",
                }
                return 403, refusal, b"{}"
            return 200, headers, content

        for where in ("main", commit):
            server.routes[f"/owner/name/resolve/{where}/{name}"] = give


@pytest.fixture
def hub_files(repo: Path, tmp_path: Path) -> SimpleNamespace:
    from safetensors.torch import save_file

    originals = _load(repo / "tests" / "models" / "originals.py")
    state = originals.hub_state(*originals.v2_states(64, 4, 2, (8, 16, 32, 64), fusion=16, hidden=8))
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "w")
    config = {
        "model_type": "chmv2",
        "backbone_config": {"num_attention_heads": 2, "out_indices": [1, 2, 3, 4], "layer_norm_eps": 1e-6},
    }
    content = {"model.safetensors": (tmp_path / "w").read_bytes(), "config.json": json.dumps(config).encode()}
    return SimpleNamespace(content=content)


def test_the_hub_is_asked_through_its_own_library(
    server: Any, hub_files: SimpleNamespace, tmp_path: Path, repo: Path
) -> None:
    _serve_hub(server, hub_files.content)
    said = _hub_run(server, tmp_path, repo, "hf://owner/name")
    assert (
        said.startswith("path ") and (tmp_path / "cache" / "models" / "converted") in Path(said[5:]).parents
    )
    model = load_model(Path(said[5:]))
    assert model.card["source"] == "hf://owner/name" and model.card["licence"] == "DINOv3 License"


def test_a_gated_hub_model_is_explained(
    server: Any, hub_files: SimpleNamespace, tmp_path: Path, repo: Path
) -> None:
    _serve_hub(server, hub_files.content, token="wanted")
    said = _hub_run(server, tmp_path, repo, "hf://owner/name")
    assert said.startswith("error 2 https://huggingface.co/owner/name: these weights are gated")
    assert "HF_TOKEN" in said and "\n" not in said


def test_a_hub_model_that_is_not_there(server: Any, tmp_path: Path, repo: Path) -> None:
    headers = {"X-Error-Code": "RepoNotFound"}
    server.routes["/api/models/owner/gone/revision/main"] = lambda *_: (401, headers, b"{}")
    said = _hub_run(server, tmp_path, repo, "hf://owner/gone")
    assert said.startswith("error 2 hf://owner/gone: no such model on the hub")
