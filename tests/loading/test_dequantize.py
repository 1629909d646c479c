from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from paceline.loading.dequantize import CHUNK, CHUNKS_OF_SCALES, DENSE, QUANTIZED, dequantize, value_dtype
from paceline.loading.gguf import BLOCK_TYPES

TYPES = {block.name: block for block in BLOCK_TYPES.values()}
# Where a block's fp16 numbers begin, in halves from its start; all other bytes may be anything.
HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 1),
    "Q5_0": (0,),
    "Q5_1": (0, 1),
    "Q8_0": (0,),
    "Q2_K": (40, 41),
    "Q3_K": (54,),
    "Q4_K": (0, 1),
    "Q5_K": (0, 1),
    "Q6_K": (104,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}


def random_blocks(name: str, rows: int, blocks: int) -> np.ndarray:
    """Random bytes but for the fp16 scales, which are finite (random bits would give NaN, unequal to itself)."""
    generator = np.random.default_rng(3)
    raw = generator.integers(0, 256, (rows, blocks, TYPES[name].nbytes), dtype=np.uint8)
    for half in HALVES[name]:
        raw.view(np.float16)[:, :, half] = generator.standard_normal((rows, blocks)).astype(np.float16)
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("name", sorted(QUANTIZED))
@pytest.mark.parametrize(("rows", "chunks"), [(1, 0), (3, 0.4), (5, 0.21 * CHUNKS_OF_SCALES)])
def test_equals_the_gguf_package_bitwise(name: str, rows: int, chunks: float) -> None:
    """One block; a chunk and a part of one; more than the scales of one go."""
    block = TYPES[name]
    raw = random_blocks(name, rows, 1 + round(chunks * CHUNK / block.elements))
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])
    values = dequantize(torch.from_numpy(raw), block)
    assert values.shape == (rows, raw.shape[1] // block.nbytes * block.elements)
    np.testing.assert_array_equal(values.numpy().view(np.int32), expected.view(np.int32))


@pytest.mark.parametrize(("name", "dtype"), DENSE.items())
def test_dense_types_are_views_in_the_stored_dtype(name: str, dtype: torch.dtype) -> None:
    values = torch.arange(12, dtype=dtype).view(3, 4)
    raw = values.view(torch.uint8)
    read = dequantize(raw, TYPES[name])
    assert torch.equal(read, values)
    assert read.data_ptr() == raw.data_ptr()
    assert value_dtype(name) == dtype


def test_block_table_equals_the_gguf_packages() -> None:
    for kind, block in BLOCK_TYPES.items():
        assert gguf.GGMLQuantizationType(kind).name == block.name
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)] == (block.elements, block.nbytes)
    assert {name for name in TYPES if value_dtype(name) is None} == {
        *("IQ1_M", "IQ1_S", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ3_S", "IQ3_XXS", "MXFP4", "TQ1_0", "TQ2_0"),
        *("F64", "I8", "I16", "I32", "I64"),
    }
