"""What an engine takes on a CUDA device beside the parts of sizing.py: cuBLAS's workspace, and what captured steps
keep: the buffers that they read and write, and the pool of memory that their graphs compute in. No torch.
"""

from __future__ import annotations

from dataclasses import replace

from paceline import sizing
from paceline.config import DecoderConfig

# torch gives cuBLAS so much a stream that multiplies by it: 32 MiB since compute capability 9.0, 2 of 4 MiB and 8 of
# 16 KiB before; and cuBLASLt, which adds biases, 1 MiB more.
BLAS_WORKSPACE = 32 << 20
OLD_BLAS_WORKSPACE = (8 << 20) + (128 << 10)
LT_WORKSPACE = 1 << 20

# torch's allocator: tensors of up to 1 MiB share segments of 2 MiB; larger ones get segments of 20 MiB, and from 10 MiB
# on one of their own size in whole 2 MiB.
SMALL_TENSOR = 1 << 20
SEGMENT = 2 << 20
LARGE_SEGMENT = 10 << 20

DECODE_FIELDS = 10  # 8 bytes of each row: its position, length, token and what it asks of the sampler


def workspace_bytes(capability: tuple[int, int] | None) -> int:
    """cuBLAS's for one stream. `capability`: NVIDIA's compute capability; None takes the largest."""
    blas = OLD_BLAS_WORKSPACE if capability is not None and capability < (9, 0) else BLAS_WORKSPACE
    return blas + LT_WORKSPACE


def decode_buffer_bytes(num_groups: int, rows: int, context: int, block_size: int) -> int:
    """The device's buffers of captured decodes of up to `rows` requests (engine/decode_step.py): the fields, of
    each KV group a slot and a change of its block tables, a token and what shows whether it may be trusted, and a block
    table of each group."""
    blocks = -(-context // block_size)
    return rows * (8 * (DECODE_FIELDS + 3 * num_groups) + 16 + 4 * num_groups * blocks)


def prompt_buffer_bytes(config: DecoderConfig, rows: int, context: int, block_size: int, bytes_per_value: int) -> int:
    """Likewise of captured steps of so many decodes and a few tokens of prompts (engine/prompt_step.py): of each token
    its id, its position, a slot in each KV group and its hidden state; of each request where it begins and ends, and
    its block tables."""
    groups, blocks = len(config.kv_groups), -(-max(context, sizing.SMALL_STEP) // block_size)
    token = 16 + 8 * groups + config.hidden_size * bytes_per_value
    return (rows + sizing.SMALL_STEP) * token + (rows + sizing.PROMPTS) * (8 + 4 * groups * blocks) + 4


def graph_step_bytes(
    config: DecoderConfig,
    rows: int,
    bytes_per_value: int,
    *,
    unpacked: sizing.FormatBytes,
    workspace: int,
    held: sizing.Held | None = None,
) -> int:
    """What one captured decode of `rows` requests computes in, or so many beside a few tokens of prompts, which go
    through cuBLAS: its `workspace` for the stream that captures lies in the pool. What these choose is computed
    outside."""
    backend = replace(sizing.cuda_backend(bytes_per_value), sampling_bytes=sizing.STATIC_SAMPLING_BYTES)
    decode = sizing.StepShape(rows, rows, 1, 1, scores=False)
    prompts = replace(decode, num_tokens=rows + sizing.SMALL_STEP, num_seqs=1, greedy=True)
    parts = [
        sizing.activation_bytes(config, step, bytes_per_value, unpacked=unpacked, backend=backend, held=held)
        for step in (decode, prompts)
    ]
    return max(parts) + workspace


def reserved_bytes(step_bytes: int) -> int:
    """What the graphs' pool gets at once, as one segment for all sizes of graphs: else each size that is captured would
    add segments of its own, those of decodes of 8, 16, ... 64 rows 4.5 times the last's."""
    return max(LARGE_SEGMENT, -(-step_bytes // SEGMENT) * SEGMENT)


def graph_pool_bytes(step_bytes: int) -> int:
    """The pool of the graphs, in whole segments: what is reserved, and the small tensors of the largest graph that has
    no other, one segment of them filled in part."""
    small = min(step_bytes, SMALL_TENSOR // 8 * sizing.STATIC_SAMPLING_BYTES)
    return reserved_bytes(step_bytes) + (-(-small // SEGMENT) + 1) * SEGMENT
