"""CRC-32C against published values and a bit-by-bit reference."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from canopy.download import crc32c, file_crc32c


def bit_by_bit(data: bytes) -> int:
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


@pytest.mark.parametrize(
    ("data", "expected"),  # RFC 3720, B.4, and the usual check value
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
    ],
)
def test_published_values(data, expected):
    assert crc32c(data) == expected


@pytest.mark.parametrize("size", [4095, 4096, 4097, 12_289])
def test_long_data_agree_with_the_definition(size):
    data = random.Random(size).randbytes(size)
    assert crc32c(data) == bit_by_bit(data)


@given(st.binary(max_size=9000), st.integers(0, 9000))
def test_it_can_be_continued(data, cut):
    assert crc32c(data[cut:], crc32c(data[:cut])) == crc32c(data)


def test_files_are_hex_of_eight_digits(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"123456789")
    assert file_crc32c(path) == "e3069283"
    path.write_bytes(b"")
    assert file_crc32c(path) == "00000000"
