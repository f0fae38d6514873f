"""GEDI shots written to a GeoParquet file, in pieces and verified.

The file follows GeoParquet 1.0: a WKB point per shot in EPSG:4326 (the place of the lowest mode), and the
JSON that says so under the key `geo`. Under the key `canopy` lie the filter and the granules it was made of.
There is no wall-clock time in it: the same granules and options give the same bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from canopy.errors import InputError, OutputError
from canopy.sources.gedi_h5 import require_gedi
from canopy.sources.gedi_names import EPOCH_UNIX_S, L2A, Variable

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIXES = (".parquet", ".geoparquet")
# Rows per row group: large enough to compress, small enough to hold.
GROUP_ROWS = 131_072


def rh_column(percent: int) -> str:
    """Name of the column of a relative height: rh_95, rh_98."""
    return f"rh_{percent}"


def shot_schema(rh: Sequence[int], extras: Sequence[Variable], facts: Mapping[str, object]) -> pa.Schema:
    """Columns and metadata of the output, in order; `extras` come from Levels 2B and 4A."""
    import pyarrow as pa

    require_gedi()
    types: dict[str, Any] = {"shot_number": pa.uint64(), "beam": pa.string(), "beam_type": pa.string()}
    types |= {"lat": pa.float64(), "lon": pa.float64()}
    types |= {rh_column(percent): pa.float32() for percent in rh}
    types |= {variable.column: getattr(pa, variable.dtype)() for variable in L2A}
    types |= {"time": pa.timestamp("us", tz="UTC"), "granule": pa.string(), "weight": pa.float32()}
    types |= {variable.column: getattr(pa, variable.dtype)() for variable in extras}
    types["geometry"] = pa.binary()
    column = {"encoding": "WKB", "geometry_types": ["Point"], "crs": _wgs84()}
    geo = {"version": "1.0.0", "primary_column": "geometry", "columns": {"geometry": column}}
    metadata = {"geo": json.dumps(geo), "canopy": json.dumps(facts, sort_keys=True)}
    return pa.schema(list(types.items()), metadata=metadata)


def as_table(schema: pa.Schema, columns: Mapping[str, np.ndarray | str | None], count: int) -> pa.Table:
    """Arrays (count,) -> an Arrow table of the schema.

    NaN, and -1 in columns of flags, become nulls; a single text is repeated; None is a column of nulls.
    `time` comes as seconds since 2018-01-01, the geometry is made here of `lon` and `lat`.
    """
    import pyarrow as pa

    arrays = []
    for field in schema:
        values = columns.get(field.name)
        if field.name == "geometry":
            arrays.append(_points(np.asarray(columns["lon"]), np.asarray(columns["lat"])))
        elif values is None:
            arrays.append(pa.nulls(count, field.type))
        elif isinstance(values, str):
            arrays.append(pa.repeat(pa.scalar(values, field.type), count))
        elif field.name == "time":
            known = np.isfinite(values)
            micros = np.rint((np.where(known, values, 0) + EPOCH_UNIX_S) * 1e6).astype(np.int64)
            arrays.append(pa.array(micros, pa.int64(), mask=~known).cast(field.type))
        elif pa.types.is_uint8(field.type):
            arrays.append(pa.array(np.maximum(values, 0).astype(np.uint8), field.type, mask=values < 0))
        elif pa.types.is_floating(field.type):
            arrays.append(pa.array(values.astype(field.type.to_pandas_dtype()), field.type, from_pandas=True))
        else:
            arrays.append(pa.array(values, field.type))
    return pa.Table.from_arrays(arrays, schema=schema)


class ShotWriter:
    """Write tables of shots one after the other; a context manager.

    The rows go to a hidden file beside `path`. On a clean exit it is closed, read back row group by row
    group, compared with what was written, flushed and renamed; on an exception, or when nothing was added,
    it is removed and `path` is as before. Memory holds one row group.

    Raises InputError for a name that is not .parquet, an existing file without `overwrite`, or no such
    folder; OutputError for a disk that does not take it.
    """

    def __init__(self, path: str | Path, schema: pa.Schema, *, overwrite: bool = False) -> None:
        self.path, self.schema, self.rows = check_out(path, overwrite), schema, 0
        self._waiting: list[pa.Table] = []
        self._held = 0
        self._sums: list[tuple[int, ...]] = []
        self._writer: Any = None
        self._temporary: Path | None = None

    def add(self, table: pa.Table) -> None:
        """Append a table of the schema."""
        self._waiting.append(table)
        self._held += len(table)
        self.rows += len(table)
        if self._held >= GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        whole = pa.concat_tables(self._waiting).combine_chunks()
        self._waiting, self._held = [], 0
        try:
            if self._writer is None:
                handle, name = tempfile.mkstemp(
                    prefix=f".{self.path.name}.", suffix=".partial", dir=self.path.parent
                )
                os.close(handle)
                self._temporary = Path(name)
                self._writer = pq.ParquetWriter(name, self.schema, compression="zstd")
            for first in range(0, len(whole), GROUP_ROWS):
                piece = whole.slice(first, GROUP_ROWS)
                self._writer.write_table(piece, row_group_size=GROUP_ROWS)
                self._sums.append(_sums(piece))
        except OSError as error:
            raise self._failure(error) from error

    def close(self) -> None:
        """Verify the file and move it into place; does nothing when no row was added."""
        try:
            if self._held:
                self._flush()
            if self._writer is None or self._temporary is None:
                return
            self._writer.close()
            self._verify(self._temporary)
            with self._temporary.open("rb+") as file:  # Windows flushes only what may be written
                os.fsync(file.fileno())
            # The temporary file was made private; the result gets the permissions of any new file.
            mask = os.umask(0)
            os.umask(mask)
            self._temporary.chmod(0o666 & ~mask)
            os.replace(self._temporary, self.path)
        except OSError as error:
            raise error if isinstance(error, OutputError) else self._failure(error) from error
        finally:
            self.abort()

    def abort(self) -> None:
        """Drop what was written and not yet finished."""
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)
        self._writer = self._temporary = None

    def _verify(self, path: Path) -> None:
        import pyarrow.parquet as pq

        with pq.ParquetFile(path) as made:
            same = made.num_row_groups == len(self._sums) and made.schema_arrow.equals(self.schema)
            if not same or any(
                _sums(made.read_row_group(index)) != sums for index, sums in enumerate(self._sums)
            ):
                raise OutputError(
                    "read back differently from what was written",
                    where=self.path,
                    remedy="nothing was kept; check the disk and run again",
                )

    def _failure(self, error: OSError) -> OutputError:
        reason = " ".join(str(error.strerror or error).split())[:160]
        return OutputError(f"cannot be written ({reason})", where=self.path)

    def __enter__(self) -> ShotWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def check_out(path: str | Path, overwrite: bool) -> Path:
    """A path that may be written to; InputError or OutputError otherwise."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"the ending {path.suffix!r}", where=path, expected=" or ".join(SUFFIXES))
    if path.is_dir():
        raise InputError("a folder", where=path, expected="the name of a .parquet file")
    if path.exists() and not overwrite:
        raise InputError("the file exists", where=path, remedy="use --overwrite to replace it")
    if not path.parent.is_dir():
        raise InputError("no such folder", where=path.parent, remedy="create it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError("the folder cannot be written to", where=path.parent)
    return path


def _wgs84() -> Any:
    """EPSG:4326 as PROJJSON; GeoParquet has longitude first whatever the CRS's own axis order."""
    import pyproj

    return pyproj.CRS("EPSG:4326").to_json_dict()


def _points(lon: np.ndarray, lat: np.ndarray) -> pa.Array:
    """WKB points, little endian, 21 bytes each."""
    import pyarrow as pa

    made = np.zeros(len(lon), np.dtype([("order", "u1"), ("kind", "<u4"), ("x", "<f8"), ("y", "<f8")]))
    made["order"], made["kind"], made["x"], made["y"] = 1, 1, lon, lat
    offsets = np.arange(len(lon) + 1, dtype=np.int32) * made.itemsize
    return pa.Array.from_buffers(
        pa.binary(), len(lon), [None, pa.py_buffer(offsets), pa.py_buffer(made.tobytes())]
    )


def _sums(table: pa.Table) -> tuple[int, ...]:
    """One checksum per column, of values and gaps, the same however Arrow holds them."""
    import pyarrow as pa

    sums = []
    for column in table.columns:
        array = pa.concat_arrays(column.chunks)
        gaps = np.asarray(array.is_null())
        if pa.types.is_string(array.type) or pa.types.is_binary(array.type):
            _, starts, texts = array.buffers()
            bounds = np.frombuffer(starts, np.int32)[array.offset : array.offset + len(array) + 1]
            data = np.diff(bounds).tobytes() + memoryview(texts)[bounds[0] : bounds[-1]].tobytes()
        else:
            kind = pa.int64() if pa.types.is_timestamp(array.type) else array.type
            data = array.cast(kind).fill_null(0).to_numpy(zero_copy_only=False).tobytes()
        sums.append(zlib.crc32(data, zlib.crc32(np.packbits(gaps).tobytes())))
    return tuple(sums)
