"""Chips files: heights to the centimetre, unknown stays unknown, broken files named."""

from __future__ import annotations

import numpy as np
import pytest

from canopy.chips.store import read_store, write_store
from canopy.errors import DataError


def test_round_trip(make_chip, tmp_path):
    first, second = make_chip("a", split="train"), make_chip("b", split="val", side_m=20, seed=1)
    first.chm_m[3:5] = np.nan
    write_store(tmp_path / "c.safetensors", [first, second], "abc")
    store = read_store(tmp_path / "c.safetensors")
    assert store.data_sha256 == "abc" and [c.row for c in store.chips] == [first.row, second.row]
    np.testing.assert_allclose(store.chips[0].chm_m, first.chm_m, atol=0.0051)
    assert np.array_equal(store.chips[0].rgb, first.rgb)
    assert [c.row.id for c in store.of_split("val", "test")] == ["b"]


def test_broken_files(tmp_path):
    with pytest.raises(DataError, match="no such chips file"):
        read_store(tmp_path / "none.safetensors")
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"not chips at all, sorry")
    with pytest.raises(DataError, match="damaged"):
        read_store(bad)
