"""Packing and multiplying a few rows at a time: the same numbers, and no more memory than is planned."""

from __future__ import annotations

import pytest
import torch

from paceline.formats import FORMATS, chunks, int4, pack

PACKED = ["int8", "int4", "fp8"]


@pytest.fixture(params=[*PACKED, "int4 in words"])
def format(request, monkeypatch):
    if request.param == "int4 in words":  # as on a device without torch's CPU op
        monkeypatch.setattr(int4, "int4_refusal", lambda rows, device: "not here")
    return request.param.removesuffix(" in words")


def test_chunks_are_as_one(format, monkeypatch):
    values = torch.randn(320, 256)
    x, bias = torch.randn(200, 256), torch.randn(320)
    whole = pack(values, format, dtype=torch.float32, device="cpu")
    expected = whole.matmul(x, bias)
    monkeypatch.setattr(chunks, "CHUNK_VALUES", 64 * 256)
    monkeypatch.setattr(chunks, "UNPACKED_VALUES", 128 * 256)
    parts = pack(values, format, dtype=torch.float32, device="cpu")
    assert torch.equal(parts.unpack(), whole.unpack())
    torch.testing.assert_close(parts.matmul(x, bias), expected, rtol=1e-5, atol=1e-5)


def test_values_are_not_changed(format):
    values = torch.randn(64, 128)
    before = values.clone()
    pack(values, format, dtype=torch.float32, device="cpu")
    assert torch.equal(values, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_holds_what_is_planned(format, dtype, live_bytes, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_VALUES", 128 * 512)
    values = torch.randn(1024, 512).to(dtype)
    with live_bytes() as live:
        packed = pack(values, format, dtype=dtype, device="cpu")
    planned = packed.nbytes + FORMATS[format].packing_bytes(1024, 512, dtype)
    assert live.peak <= planned <= 1.3 * live.peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_unpacks_what_is_planned(format, dtype, live_bytes, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_VALUES", 64 * 512)
    monkeypatch.setattr(chunks, "UNPACKED_VALUES", 256 * 512)
    weight = pack(torch.randn(1024, 512).to(dtype), format, dtype=dtype, device="cpu")
    x = torch.randn(200, 512).to(dtype)
    with live_bytes() as live:
        y = weight.matmul(x)
    # Beside the answer the last part of it, before it has its place there.
    planned = y.nbytes * (1 + 256 / 1024) + FORMATS[format].unpack_bytes(1024, 512, dtype)
    assert live.peak <= planned <= 1.3 * live.peak
