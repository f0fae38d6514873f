"""Is a finished region what it claims to be? The outputs of `canopy map`, checked by other programs.

    pip install stac-valid
    python benchmarks/region_outputs.py DIR [--picture mosaic.png]
    python benchmarks/region_outputs.py DIR --schemas FOLDER     # where there is no network

Every STAC file goes through stac-validator; every tile through rio-cogeo (strict) and a read of all its
blocks; and the mosaic has to be, pixel for pixel, what its tiles are, each pixel from exactly one of them.

stac-validator fetches the schemas of STAC's extensions. `--schemas` takes a folder that holds them instead,
named as their address with / as _; where one is missing it is taken from the tests of the package
pystac-ext-NAME, whose source distribution pip downloads. The schemas of STAC itself are in pystac.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.metadata
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from region_small import report

EXTENSIONS = "stac-extensions.github.io"


def file_name(address: str) -> str:
    return address.split("//")[1].rstrip("#").replace("/", "_")


def recorded(distribution: Path) -> Iterator[tuple[str, bytes]]:
    """Schemas in the recorded web traffic of a package's tests: (address, JSON)."""
    import yaml

    with tarfile.open(distribution) as archive:
        for member in archive:
            if "/cassettes/" not in member.name or not member.name.endswith(".yaml"):
                continue
            file = archive.extractfile(member)
            for one in yaml.safe_load(file)["interactions"] if file else ():
                body = one["response"]["body"].get("string") or b""
                body = body.encode() if isinstance(body, str) else body
                if body[:2] == b"\x1f\x8b":
                    body = gzip.decompress(body)
                if one["request"]["uri"].endswith("schema.json") and body:
                    yield one["request"]["uri"], body


def fetch_schemas(folder: Path) -> None:
    """Fill a folder with the schemas of the extensions that our catalogs use."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("file", "projection", "raster", "mlm"):
        package = f"pystac-ext-{name}"
        with tempfile.TemporaryDirectory() as here:
            version = importlib.metadata.version(package)
            subprocess.run(
                [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:",
                 "--no-build-isolation", "-d", here, f"{package}=={version}"], check=True,
            )  # fmt: skip
            for archive in Path(here).glob("*.tar.gz"):
                for address, body in recorded(archive):
                    (folder / file_name(address)).write_bytes(body)


def schema_map(folder: Path) -> dict[str, str]:
    """Addresses to local files: the extensions' in `folder`, STAC's own in pystac."""
    import pystac

    found = {}
    for path in folder.glob(f"{EXTENSIONS}_*_schema.json"):
        _, name, version, last = path.name.split("_")
        found[f"https://{EXTENSIONS}/{name}/{version}/{last}"] = str(path)
    core = Path(pystac.__file__).parent / "validation" / "jsonschemas"
    for path in core.rglob("*.json"):
        if path.parent.name == "geojson":
            found[f"https://geojson.org/schema/{path.name}"] = str(path)
            continue
        kind = "item" if path.stem not in ("catalog", "collection") else path.stem
        found[f"https://schemas.stacspec.org/v1.1.0/{kind}-spec/json-schema/{path.name}"] = str(path)
    return found


def check_catalog(folder: Path, schemas: Path | None) -> dict[str, Any]:
    """Every STAC file of a run through stac-validator."""
    from stac_validator.stac_validator import StacValidate

    if schemas is not None and not list(schemas.glob("*.json")):
        fetch_schemas(schemas)
    known = schema_map(schemas) if schemas is not None else None
    files = [folder / name for name in ("catalog.json", "collection.json", "model.json")]
    files += [*sorted(folder.glob("stac/*.json")), *sorted(folder.glob("tiles/*.json"))]
    wrong, seen = [], set()
    for path in files:
        check = StacValidate(str(path), schema_map=known, extensions=False)
        check.run()
        for message in check.message:
            seen.update(message.get("schema", []))
            if not message.get("valid_stac"):
                wrong.append(f"{path.name}: {message.get('error_message', message)}")
    return {"stac_files": len(files), "stac_invalid": wrong, "schemas": sorted(seen)}


def check_tiles(folder: Path) -> dict[str, Any]:
    """Every tile through rio-cogeo and a read of all its blocks, and the mosaic against them."""
    import hashlib

    import numpy as np
    import rasterio
    from rasterio.windows import from_bounds
    from rio_cogeo import cog_validate

    wrong, pixels = [], 0
    with rasterio.open(folder / "mosaic") as mosaic:
        covered = np.zeros(mosaic.shape, np.uint8)
        for path in sorted((folder / "tiles").glob("*.tif")):
            valid, errors, warnings = cog_validate(path, strict=True)
            item = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            with rasterio.open(path) as tile:
                values = tile.read()
                window = from_bounds(*tile.bounds, mosaic.transform).round_offsets().round_lengths()
            same = mosaic.read(window=window).tobytes() == values.tobytes()
            summed = item["assets"]["canopy_height"]["file:checksum"] == f"1220{digest}"
            if not valid or errors or warnings or not same or not summed:
                wrong.append(f"{path.name}: {errors} {warnings}, same {same}, checksum {summed}")
            covered[window.toslices()] += 1
            pixels += values[0].size
        once = int((covered == 1).sum())
        return {
            "tiles": len(list((folder / "tiles").glob("*.tif"))), "tiles_wrong": wrong,
            "pixels_in_one_tile": once, "pixels_in_none": int((covered == 0).sum()),
            "pixels_in_several": int((covered > 1).sum()),
        }  # fmt: skip


def draw(folder: Path, picture: Path) -> None:
    """The mosaic as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import rasterio

    with rasterio.open(folder / "mosaic") as mosaic:
        scale = max(1, max(mosaic.shape) // 1600)
        shape = (mosaic.height // scale, mosaic.width // scale)
        values = mosaic.read(1, out_shape=shape, masked=True) * mosaic.scales[0]
    plt.imsave(picture, values, cmap="viridis", vmin=values.min(), vmax=values.max())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="a finished run of canopy map")
    parser.add_argument("--schemas", type=Path, help="folder of schemas, filled where it is empty")
    parser.add_argument("--picture", type=Path, help="draw the mosaic")
    parser.add_argument("--out", type=Path, help="folder for region_outputs.json")
    options = parser.parse_args()
    results = check_tiles(options.folder) | check_catalog(options.folder, options.schemas)
    if options.picture:
        draw(options.folder, options.picture)
    report(results, options.out, "region_outputs")
    sys.exit(bool(results["stac_invalid"] or results["tiles_wrong"] or results["pixels_in_several"]))


if __name__ == "__main__":
    main()
