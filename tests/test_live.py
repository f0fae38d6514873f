"""Does every address of the manifests still answer? For a weekly run: `pytest -m network tests/test_live.py`.

One small request per manifest, and a table of what answered. Nothing else needs this, and without a network
it is skipped; what it asks and how it judges is tried here on a local server.
"""

from __future__ import annotations

import time
from io import BytesIO
from urllib.parse import urlsplit

import numpy as np
import pytest
import yaml
from PIL import Image

from canopy import web
from canopy.config import manifest_names
from canopy.errors import CanopyError, FetchError
from canopy.files import is_url
from canopy.geo.area import AOI
from canopy.imagery.base import ReadOptions
from canopy.imagery.named import ImageryManifest, named_source, open_named
from canopy.labels.catalog import label_source
from canopy.models.registry import published_models

WELL_KNOWN = ("https://data.geo.admin.ch/api/stac/v1", "https://api.imagery.hotosm.org/stac")
ADDRESSES = [
    *(("imagery", name) for name in manifest_names("imagery") if is_url(named_source(name).href)),
    *(("labels", name) for name in manifest_names("labels") if label_source(name).href),
    *(("models", name) for name in published_models()),
]


def ask_imagery(manifest: ImageryManifest) -> str:
    """One tile in the middle of the coverage, or the catalog's first document; raises CanopyError."""
    if manifest.kind != "xyz":
        found = web.get(manifest.location()).json()
        if not isinstance(found, dict) or "links" not in found:
            raise FetchError("answers, but with no STAC", where=manifest.href)
        return f"STAC with {len(found['links'])} links"
    spot = manifest.geometry.representative_point()
    area = AOI.from_bbox([spot.y, spot.x], size_m=2)
    with open_named(manifest.name, area, ReadOptions()) as source:
        row, col = source.lattice.rowcol(*area.to_crs(source.native_crs).geometry.centroid.coords[0])
        image = source.read(source.lattice.window(int(row), int(col), 1, 1).pad(1))
    if not image.valid.any():
        raise FetchError("answers, but has no image in the middle of its coverage", where=manifest.href)
    return f"a pixel of {np.round(image.rgb[:, 1, 1] * 255).astype(int).tolist()}"


def ask(kind: str, name: str) -> str:
    """What a manifest's address answers, in a few words; raises CanopyError where it does not."""
    if kind == "imagery":
        return ask_imagery(named_source(name))
    if kind == "labels":
        manifest = label_source(name)
        tails = {
            "wfs": "?SERVICE=WFS&REQUEST=GetCapabilities", "neon": "/products/DP3.30015.001",
            "quadkeys": "/tiles.geojson",
        }  # fmt: skip
        address = manifest.href + tails.get(manifest.protocol, "")
    else:
        model = published_models()[name]
        address = model.files[0].url if model.files else model.hub.replace("hf://", "https://huggingface.co/")
    first, size = web.peek(address)
    if not first:
        raise FetchError("does not answer", where=address)
    return "answers" + (f", {size / 1e6:.1f} MB" if size and kind == "models" else "")


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest):
    """Rows that are shown at the end; skips where there is no network at all."""
    with web.use_policy(web.RetryPolicy(attempts=2, timeout_s=20.0)):
        if not any(web.peek(address)[0] for address in WELL_KNOWN):
            pytest.skip("no network")
        rows: list[str] = []
        yield rows
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        print("", "what the manifests' addresses answered", *rows, sep="\n")


@pytest.mark.network
@pytest.mark.parametrize(("kind", "name"), ADDRESSES, ids=lambda value: str(value))
def test_an_address_still_answers(table, kind, name):
    started = time.monotonic()
    try:
        answer, problem = ask(kind, name), None
    except CanopyError as error:
        answer, problem = f"FAILED: {error}", error
    table.append(f"{kind:8} {name:24} {time.monotonic() - started:5.1f} s  {answer}")
    if problem is not None:
        raise problem


def test_the_question_tells_a_host_that_answers_from_one_that_does_not(server, tmp_path, monkeypatch):
    def manifest(kind: str, href: str) -> ImageryManifest:
        (tmp_path / "imagery").mkdir(exist_ok=True)
        facts = {
            "name": "mine", "title": "t", "kind": kind, "href": href, "gsd_m": 150, "licence": "CC0",
            "attribution": "nobody", "dates": "2020/2021", "coverage": [1.0, 45.0, 1.1, 45.1],
        }  # fmt: skip
        (tmp_path / "imagery" / "mine.yaml").write_text(yaml.safe_dump(facts))
        return named_source("mine")

    monkeypatch.setenv("CANOPY_MANIFESTS", str(tmp_path))
    picture = BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (256, 256, 3), np.uint8)).save(picture, "PNG")
    host = urlsplit(server.url).netloc
    tiles = f"http://{host}/tile?z={{z}}&x={{x}}&y={{y}}"
    server.put("/tile", picture.getvalue(), "image/png")
    assert "a pixel of" in ask_imagery(manifest("xyz", tiles)) and server.asked("/tile") == 1
    blank = BytesIO()
    Image.new("RGB", (256, 256), "white").save(blank, "PNG")
    server.put("/tile", blank.getvalue(), "image/png")
    with pytest.raises(FetchError, match="no image in the middle"):
        ask_imagery(manifest("xyz", tiles))
    server.files.clear()
    with pytest.raises(FetchError, match="no such file"):
        ask_imagery(manifest("xyz", tiles))
    server.put("/catalog.json", {"type": "Catalog", "links": [{}]})
    assert ask_imagery(manifest("stac", f"{server.url}/catalog.json")) == "STAC with 1 links"
    server.put("/catalog.json", {"message": "moved"})
    with pytest.raises(FetchError, match="no STAC"):
        ask_imagery(manifest("stac", f"{server.url}/catalog.json"))
