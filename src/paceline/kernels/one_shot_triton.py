# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The kernel of kernels/one_shot.py, which has its protocol. This module imports Triton: import it where Triton is.

Shapes: W words of 32 bits, each one float32 value or two narrower ones; C words that an inbox holds of a rank.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def one_shot_kernel(
    x_ptr,  # W words: this rank's part
    y_ptr,  # W words: the sum, in x's dtype
    inbox_ptr,  # [2, RANKS, C], int64
    peers_ptr,  # [RANKS]: each rank's inbox_ptr as this one maps it
    sums_ptr,  # [programs]: how many sums each has taken
    W,
    C,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    PEERS: tl.constexpr,  # RANKS up to a power of two
    BLOCK: tl.constexpr,
    ASM: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    program = tl.program_id(0)
    word = program * BLOCK + tl.arange(0, BLOCK)
    if DEPENDENT:
        gdc_launch_dependents()
    # Fixed when the ranks met: no kernel before this one writes them.
    which = tl.arange(0, PEERS)
    peers = tl.load(peers_ptr + which, mask=which < RANKS, other=0)
    if DEPENDENT:
        gdc_wait()
    number = tl.load(sums_ptr + program) + 1
    half = (number & 1) * RANKS
    mine = tl.load(x_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + word, mask=word < W, other=0)
    packet = (number.to(tl.int64) << 32) | (mine.to(tl.int64) & 0xFFFFFFFF)
    for r in tl.static_range(RANKS):
        if r != RANK:
            peer_ptr = tl.sum(tl.where(which == r, peers, 0), 0).to(tl.pointer_type(tl.int64))
            send(peer_ptr + (half + RANK) * C + word, packet, ASM)
    low, high = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for r in tl.static_range(RANKS):
        got = mine
        if r != RANK:
            got = receive(inbox_ptr + (half + r) * C + word, number)
        low += unpack(got, 0, x_ptr.dtype.element_ty)
        if x_ptr.dtype.element_ty.primitive_bitwidth == 16:
            high += unpack(got, 16, x_ptr.dtype.element_ty)
    summed = pack(low, high, x_ptr.dtype.element_ty)
    tl.store(y_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + word, summed, mask=word < W)
    tl.store(sums_ptr + program, number)


@triton.jit
def send(pointers, packets, ASM: tl.constexpr):
    """Each packet at once or not at all, for any GPU to see."""
    if ASM:
        tl.inline_asm_elementwise(
            "st.relaxed.sys.global.b64 [$1], $2; mov.b32 $0, 0;",
            "=r,l,l",
            [pointers.to(tl.int64), packets],
            tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.store(pointers, packets)


@triton.jit
def receive(pointers, number):
    """The words of the packets of this number; waits until all are there."""
    packets = tl.load(pointers, volatile=True)
    while tl.sum(((packets >> 32).to(tl.int32) != number).to(tl.int32), 0) > 0:
        packets = tl.load(pointers, volatile=True)
    return (packets & 0xFFFFFFFF).to(tl.int32)


@triton.jit
def unpack(word, shift: tl.constexpr, dtype: tl.constexpr):
    if dtype.primitive_bitwidth == 32:
        value = word.to(dtype, bitcast=True)
    else:
        value = (word >> shift).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return value


@triton.jit
def pack(low, high, dtype: tl.constexpr):
    if dtype.primitive_bitwidth == 32:
        word = low.to(tl.int32, bitcast=True)
    else:
        word = low.to(dtype).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        word |= high.to(dtype).to(tl.int16, bitcast=True).to(tl.int32) << 16
    return word
