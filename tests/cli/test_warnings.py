"""Nothing that libraries warn of is caused by the main commands, and what is does not reach a user."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import rasterio

METRE = rasterio.Affine(1, 0, 500_000, 0, -1, 4_882_000)
PROGRAM = """
import json, sys, warnings
from canopy.cli.main import main
warnings.filterwarnings("default", module=r"canopy\\.")  # those that Python hides, too
for words in json.loads(sys.argv[1]):
    print("$", *words, file=sys.stderr)
    sys.argv = ["canopy", *words]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, stop.code
"""


def test_main_commands_say_nothing_but_their_own(make_image, model_file, repo: Path, tmp_path: Path) -> None:
    """One process; `-v` shows what libraries warned of."""
    heights = np.random.default_rng(0).uniform(0, 20, (1, 50, 60)).astype(np.float32)
    for name in ("a.tif", "b.tif"):
        make_image(name, heights + (name == "b.tif"), transform=METRE, nodata=float("nan"))
    make_image(mask=np.arange(12_000).reshape(100, 120) % 7 > 0)
    scene, predict = "scene", ["predict", "image.tif", "--model", str(model_file), "-o"]
    stands = {"type": "Polygon", "coordinates": [[[-75, 44.0909], [-74.9995, 44.0909], [-74.9995, 44.0911],
                                                  [-75, 44.0911], [-75, 44.0909]]]}  # fmt: skip
    (tmp_path / "stands.geojson").write_text(json.dumps(stands))
    commands = [
        ["data", "synth", "-o", scene, "--size-m", "200", "--gsd", "1"],
        [*predict, "m.tif", "--quicklook", "--date-band"],
        [*predict, "w.tif", "--crs", "EPSG:4326", "--gsd", "2", "--aoi", "stands.geojson"],
        ["predict", "--imagery", "demo", "--bbox", "44.083,-71.296", "--size-m", "50", *predict[2:], "d.tif"],
        ["evaluate", "b.tif", "--reference", "a.tif", "--by", "height", "--replicates", "20", "-o", "report"],
        ["data", "gedi", f"{scene}/gedi.h5", "-o", "shots.parquet", "--filter", "none"],
        ["evaluate", f"{scene}/chm.tif", "--reference", "shots.parquet", "--replicates", "20"],
        ["compare", "a.tif", "b.tif", "--as", "dates", "-o", "change"],
        ["stats", "a.tif", "--zones", "stands.geojson", "-o", "stats.parquet"],
        ["data", "chm", f"{scene}/points.laz", "-o", "chm.tif", "--workers", "1"],
        ["data", "chm", "--dsm", "b.tif", "--dtm", "a.tif", "-o", "minus.tif"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([[*words, "-v"] for words in commands])],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(repo), "PYTHONWARNINGS": ""},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("$ ") == len(commands) and "Warning" not in done.stderr, done.stderr


def test_a_librarys_warning_is_for_those_who_ask(repo: Path) -> None:
    code = (
        "import logging, sys, warnings\nfrom canopy.runtime import setup_logging\n"
        "setup_logging(verbose=sys.argv[1:] == ['-v'])\n"
        "warnings.warn('one worry')\nlogging.getLogger('a.library').warning('another worry')\n"
    )
    for words in ((), ("-v",)):
        program = [sys.executable, "-c", code, *words]
        done = subprocess.run(program, cwd=repo, capture_output=True, text=True, check=True)
        assert done.stderr.count("worry") == (2 if words else 0), done.stderr
