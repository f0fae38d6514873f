"""Speed and memory of `canopy data gedi` on a granule of 8 beams x 300,000 shots, made on the fly.

    python benchmarks/gedi.py --out RESULTS          # a table on stdout and RESULTS/gedi.json
    python benchmarks/gedi.py --shots 30000          # a smaller one

Heights are stored in three ways: as h5py chunks them, in chunks of whole rows, and unchunked. Every case runs
in a process of its own and reports its seconds and what it adds to the resident memory of the bare imports.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import common

BEAMS = ("BEAM0000", "BEAM0001", "BEAM0010", "BEAM0011", "BEAM0101", "BEAM0110", "BEAM1000", "BEAM1011")
LAYOUTS = {
    "auto": {"chunks": True, "compression": 4},
    "rows": {"chunks": (256, 101), "compression": 4},
    "plain": {},
}
# Shares of the track.
AREAS = {"0.1 %": 0.001, "10 %": 0.1, "all": None}


def make_granule(path: Path, shots: int, layout: str) -> None:
    """A version 2 granule; the beams share their heights, which are copied as they are compressed."""
    import h5py
    import numpy as np

    rng = np.random.default_rng(0)
    flags = {
        "quality_flag": (rng.random(shots) > 0.3).astype("u1"),
        "degrade_flag": np.zeros(shots, "u1"),
        "sensitivity": rng.uniform(0.9, 1.0, shots).astype("f4"),
        "geolocation/sensitivity_a2": rng.uniform(0.9, 1.0, shots).astype("f4"),
        "solar_elevation": rng.uniform(-40, 60, shots).astype("f4"),
        "elev_lowestmode": rng.uniform(0, 500, shots).astype("f4"),
        "digital_elevation_model": rng.uniform(0, 500, shots).astype("f4"),
        "land_cover_data/landsat_water_persistence": np.zeros(shots, "u1"),
        "land_cover_data/urban_proportion": np.zeros(shots, "u1"),
        "lat_lowestmode": np.linspace(30, 50, shots),
        "lon_lowestmode": np.linspace(-100, -60, shots),
        "delta_time": np.linspace(1e8, 1e8 + shots / 242, shots),
    }
    with h5py.File(path, "w") as file:
        first = file.create_group(BEAMS[0])
        for name, values in flags.items():
            first.create_dataset(name, data=values, chunks=True, compression=4)
        heights = first.create_dataset("rh", (shots, 101), "f4", **LAYOUTS[layout])
        for begin in range(0, shots, 65_536):
            some = rng.gamma(2, 6, (min(65_536, shots - begin), 101))
            heights[begin : begin + len(some)] = np.round(np.sort(some, axis=1), 2)
        for beam in BEAMS[1:]:
            file.copy(first, beam)
        for index, beam in enumerate(BEAMS):
            numbers = np.arange(shots, dtype=np.uint64) + np.uint64((20_000 * 100 + index) * 10**11)
            file[beam].create_dataset("shot_number", data=numbers, chunks=True, compression=4)


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Extract in this process."""
    import geopandas  # noqa: F401  (counted as import, not as work)
    import pyarrow.parquet  # noqa: F401

    from canopy.geo.area import AOI
    from canopy.labels.gedi import extract_shots

    share, path = AREAS[case["area"]], Path(case["path"])
    area = None if share is None else AOI.from_bounds((-90, 35, -90 + 40 * share, 35 + 20 * share))
    before = common.peak_mb()
    clock = common.Clock()
    rh = [int(column) for column in case["rh"].split(",")]
    report = extract_shots(
        [path], path.with_suffix(".parquet"), area=area, rh=rh, filter=case["filter"], overwrite=True
    )
    took = clock.read()
    return {
        "kept": report.tally.kept,
        "cpu s": took["cpu_s"],
        "wall s": took["wall_s"],
        "peak MB": common.peak_mb(),
        "added MB": common.peak_mb() - before,
    }


def cases() -> list[tuple[str, str, str]]:
    """(area, filter, heights)."""
    return [
        *((area, "strict", "95,98") for area in AREAS),
        ("all", "none", "95,98"),
        ("all", "none", "0,50,100"),
    ]


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--shots", type=int, default=300_000, help="per beam")
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--dir", help="where the granules go (up to 1 GB); default: a temporary folder")
    options = parser.parse_args(argv)
    if options.child:
        print(json.dumps(measure(json.loads(options.child))))
        return
    rows = []
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        for layout in options.layouts:
            path = Path(folder) / f"{layout}.h5"
            make_granule(path, options.shots, layout)
            for area, rule, rh in cases():
                case = {"area": area, "filter": rule, "rh": rh}
                found = common.alone(__file__, case | {"path": str(path)})
                pace = {"Mshots/cpu s": len(BEAMS) * options.shots / max(found["cpu s"], 1e-3) / 1e6}
                rows.append({"heights": layout, **case, **found, **pace})
            path.unlink()
    common.show(f"canopy data gedi, {len(BEAMS)} beams x {options.shots:,} shots", rows)
    common.save(options.out, "gedi", {"shots_per_beam": options.shots}, rows)


if __name__ == "__main__":
    main()
