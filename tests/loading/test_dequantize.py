from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from paceline.loading.dequantize import CHUNK, QUANTIZED, dequantize, value_dtype
from paceline.loading.gguf import BLOCK_TYPES


def random_blocks(name: str, rows: int, blocks: int) -> np.ndarray:
    """Random bytes but for the fp16 scales, which are finite (random bits would give NaN, unequal to itself)."""
    generator = np.random.default_rng(3)
    nbytes, _ = QUANTIZED[name]
    raw = generator.integers(0, 256, (rows, blocks, nbytes), dtype=np.uint8)
    num_scales = 2 if name == "Q4_1" else 1
    scales = generator.standard_normal((rows, blocks, num_scales)).astype(np.float16)
    raw[:, :, : 2 * num_scales] = scales.view(np.uint8)
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("name", sorted(QUANTIZED))
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (3, 5), (5, CHUNK // 4 + 1)])
def test_equals_the_gguf_package_bitwise(name: str, rows: int, blocks: int) -> None:
    raw = random_blocks(name, rows, blocks)
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])
    values = dequantize(torch.from_numpy(raw), name)
    assert values.shape == (rows, 32 * blocks)
    np.testing.assert_array_equal(values.numpy().view(np.int32), expected.view(np.int32))


@pytest.mark.parametrize(("name", "dtype"), [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_dense_types_are_views_in_the_stored_dtype(name: str, dtype: torch.dtype) -> None:
    values = torch.arange(12, dtype=dtype).view(3, 4)
    raw = values.view(torch.uint8)
    read = dequantize(raw, name)
    assert torch.equal(read, values)
    assert read.data_ptr() == raw.data_ptr()
    assert value_dtype(name) == dtype


def test_block_table_equals_the_gguf_packages() -> None:
    for kind, block in BLOCK_TYPES.items():
        assert gguf.GGMLQuantizationType(kind).name == block.name
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)] == (block.elements, block.nbytes)
    assert value_dtype("Q6_K") is None
