"""The contract of all commands: help and options, exit codes, one line for what is wrong, outputs kept."""

from __future__ import annotations

import subprocess
from pathlib import Path

import behaviour_support as support
import pytest

AREA = "--bbox --size-m --bounds --bounds-crs --aoi"
TALK = "--overwrite --json --quiet --verbose"
IMAGERY = "--imagery --gsd --crs --device --precision --batch-size --workers --datetime --bands --nodata"
BANDS = "--encoding --interval --date-band --quality-band"
OPTIONS = {
    "predict": f"{AREA} {TALK} {IMAGERY} {BANDS} --model --quicklook --dry-run -o",
    "map": f"{AREA} {TALK} {IMAGERY} {BANDS} --model --grid --zoom --scheduler"
    " --shard --resume --status --dry-run -o",
    "evaluate": f"{TALK} --reference --kind --by --benchmark --model --data-dir -o",
    "compare": f"{AREA} {TALK} --as --gsd --sigma-a --sigma-b -o",
    "stats": f"{TALK} --zones --percentiles --above --interval -o",
    "train": "--resume --fast-dev-run --json --quiet --verbose -o",
    "pretrain": "--resume --fast-dev-run --json --quiet --verbose -o",
    "models list": "--json --quiet --verbose",
    "models info": "--json --quiet --verbose",
    "models convert": f"{TALK} --backbone --config --half -o",
    "models quantize": f"{TALK} --data --crops -o",
    "calibrate gedi": f"{TALK} --shots --rh --encoding -o",
    "calibrate interval": f"{TALK} --data --splits --kept-from -o",
    "data list": "--json --quiet --verbose",
    "data describe": "--json --quiet --verbose",
    "data verify": "--json --quiet --verbose",
    "data get": f"{AREA} {TALK} --product --datetime --site --match --max-gb --yes --dry-run -o",
    "data chm": f"{AREA} {TALK} --gsd --dsm --dtm --crs --ground --units -o",
    "data gedi": f"{AREA} {TALK} --rh --filter --l2b --l4a --dry-run -o",
    "data chips": f"{TALK} --manifest --synth --size-px --gsd --register --hold-out --seed --workers -o",
    "data synth": f"{TALK} --seed --size-m --gsd --gedi-jitter-m -o",
}


@pytest.mark.parametrize("command", OPTIONS)
def test_help_lists_the_options_and_an_example(canopy, command: str) -> None:
    text = canopy(*command.split(), "--help").out
    words = set(text.replace(",", " ").split())
    missing = [option for option in OPTIONS[command].split() if option not in words]
    assert not missing, f"canopy {command} --help does not show {missing}"
    assert f"canopy {command}" in text.split("Options:")[0].split("Usage:")[1].split("\n", 1)[1], "no example"


def test_as_a_process_of_its_own(inputs, model, tmp_path) -> None:
    """Exit codes and streams as a shell sees them; help without the heavy libraries."""

    def shell(*words: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            support.program(*words), cwd=tmp_path, env=support.environment(), capture_output=True, text=True,
            timeout=120,
        )  # fmt: skip

    bad = shell("predict", "none.tif", "--model", model)
    assert bad.returncode == 2 and bad.stdout == "" and bad.stderr.startswith("canopy: ")
    assert len(bad.stderr.strip().splitlines()) == 1 and not list(tmp_path.iterdir())
    version = shell("--version")
    assert version.returncode == 0 and version.stdout.startswith("canopy ") and version.stderr == ""
    code = (
        "import sys\nfrom canopy.cli.main import main\n"
        "for words, light in (['--help'], {'pydantic'}), (['predict', '--help'], set()):\n"
        "    sys.argv = ['canopy', *words]\n"
        "    try: main()\n"
        "    except SystemExit: pass\n"
        "    heavy = {'torch', 'xarray', 'matplotlib', 'geopandas', 'rasterio', 'numpy'} | light\n"
        "    heavy &= set(sys.modules)\n"
        "    if heavy: sys.exit(f'{words} imported {heavy}')\n"
    )
    light = subprocess.run(
        [support.sys.executable, "-c", code], env=support.environment(), capture_output=True, text=True
    )
    assert light.returncode == 0, light.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--gsd", "-1"), "gsd"),
        (("--encoding", "int4"), "encoding"),
        (("--device", "abacus"), "device"),
        (("--precision", "fp8"), "precision"),
        (("--backend", "abacus"), "backend"),
        (("--crs", "EPSG:1"), "EPSG:1"),
        (("--size-m", "100"), "--bbox"),
        (("--bands", "7,8,9"), "band"),
        (("--datetime", "someday"), "someday"),
        (("--bbox", "144,-75", "--size-m", "100"), "latitude"),
        (("--bbox", "44,-75,45,-74", "--bounds", "-75,44,-74,45"), "--bounds"),
        (("--bbox", "-23.55,-46.63", "--size-m", "500"), "no imagery there"),
        (("--bbox", "-74.9993,44.0903", "--size-m", "50"), "swap"),
        (("--aoi", "none.gpkg"), "none.gpkg"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_writes_nothing(canopy, inputs, model, tmp_path, words, says: str) -> None:
    ran = canopy("predict", inputs / "wood.tif", "--model", model, *words, "-o", "chm.tif", code=2)
    assert ran.error_line.startswith("canopy: ") and says.lower() in ran.error_line.lower()
    assert len(ran.error_line) < 600 and not list(tmp_path.iterdir())


def test_outputs_are_kept_unless_overwrite(canopy, inputs, model, tmp_path) -> None:
    words = f"predict {inputs}/wood.tif --model {model} --backend torch --quicklook -o chm.tif"
    for name in ("chm.tif", "chm.json", "chm.png"):
        (tmp_path / name).write_text("mine")
        line = canopy(words, code=2).error_line
        assert name in line and "--overwrite" in line and (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    canopy(words)
    canopy(words, code=2)
    canopy(words, "--overwrite")
    (tmp_path / "in.tif").write_bytes((inputs / "wood.tif").read_bytes())
    canopy("predict", "in.tif", "--model", model, "-o", "in.tif", "--overwrite", code=2)
    assert (tmp_path / "in.tif").read_bytes() == (inputs / "wood.tif").read_bytes()
    assert not [name for name in support.names_below(tmp_path) if Path(name).name.startswith(".")]


def test_a_dry_run_says_what_would_be_done(canopy, inputs, model, tmp_path) -> None:
    words = ("predict", inputs / "wood.tif", "--model", model, "--backend", "torch", "--dry-run")
    ran = canopy(*words, "--bbox", "44.0903,-74.9993", "--size-m", 50)
    assert " N, " in ran.err and " W, 50 x 50 m, 1 tile" in ran.err
    plan = canopy(*words, "--json").json
    support.check_keys("dry_run", plan)
    assert (plan["width"], plan["height"]) == (300, 240) and not list(tmp_path.iterdir())


def test_other_commands_keep_what_exists(canopy, inputs, tmp_path) -> None:
    """Those that other files of this suite do not ask."""
    wood = inputs / "wood_chm.tif"
    (tmp_path / "out").mkdir()
    for name in ("out/rgb.tif", "t.tif"):
        (tmp_path / name).write_text("mine")
    canopy("data", "synth", "-o", "out", "--size-m", 20, code=2)
    canopy("data", "chm", "--dsm", wood, "--dtm", wood, "-o", "t.tif", code=2)
    assert support.names_below(tmp_path) == {"out", "out/rgb.tif", "t.tif"}
    assert (tmp_path / "t.tif").read_text() == (tmp_path / "out" / "rgb.tif").read_text() == "mine"
