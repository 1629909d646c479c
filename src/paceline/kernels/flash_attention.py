"""Attention over tensors as they lie, in Triton: encoders, cross-attention, and whatever else has no paged cache
(FlashAttention-2, Dao, 2023; online softmax, Milakov and Gimelshein, 2018).

Legend: B sequences, S queries of each, L keys of each, H query heads, K key/value heads, D head size; T and U: the
queries and the keys of all sequences one after the other, without padding.

Queries, keys and values may be views of one projection: any strides but the last, which is 1. Which keys count is read
in the kernel: a mask or a length a sequence, never [B, 1, S, L]. A query that sees no key gives zeros, as torch's SDPA
does for a mask of booleans or -inf. A bias of the dtype's lowest number hides no key from a query whose keys all have
it: such a query gets their mean, there and here.

The plain twin is `flash_attention_ref`; the kernel is in kernels/flash_attention_triton.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from paceline.kernels.gpu import as_bytes, gpu, launch_options, triton_refusal

LARGEST_HEAD = 256
MOST_SCANNED = 8192  # keys whose mask a program looks through first, for those that bound it
SEQUENCES = 64  # of packed ones that the kernel is compiled for, at least: it looks at all of them


@dataclass(frozen=True)
class Keys:
    """Which keys a query sees, besides those that a mask or a length leaves.

    causal: query i sees keys 0 .. i + offset. window: it sees those at most so far from i + offset, on both sides.
    """

    causal: bool = False
    offset: int = 0
    window: int | None = None


ALL = Keys()


@dataclass(frozen=True)
class FlashLaunch:
    """How queries are cut into programs, and the keys into steps."""

    rows_a_tile: int  # a power of two, at least 16
    keys_a_tile: int  # the same
    warps: int
    stages: int  # of the loop over tiles: they are asked for stages - 1 ahead


def flash_refusal(q_BSHD: torch.Tensor, k_BLKD: torch.Tensor, v_BLKD: torch.Tensor) -> str | None:
    """Why flash_attention cannot take them; None when it can."""
    return triton_refusal(q_BSHD.device, q_BSHD.dtype) or flash_shape_refusal(q_BSHD, k_BLKD, v_BLKD)


def flash_shape_refusal(q_BSHD: torch.Tensor, k_BLKD: torch.Tensor, v_BLKD: torch.Tensor) -> str | None:
    """flash_refusal without the device: what the interpreter, too, cannot take."""
    if q_BSHD.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"dtype is {q_BSHD.dtype}"
    if not q_BSHD.dtype == k_BLKD.dtype == v_BLKD.dtype:
        return f"queries are {q_BSHD.dtype}, keys {k_BLKD.dtype} and values {v_BLKD.dtype}"
    if q_BSHD.shape[-1] > LARGEST_HEAD:
        return f"heads of {q_BSHD.shape[-1]} are larger than {LARGEST_HEAD}"
    if k_BLKD.shape != v_BLKD.shape or q_BSHD.shape[-1] != k_BLKD.shape[-1]:
        return "heads of queries, keys and values differ in size"
    if k_BLKD.shape[-2] == 0 or q_BSHD.shape[-2] % k_BLKD.shape[-2]:
        return f"{q_BSHD.shape[-2]} query heads do not share {k_BLKD.shape[-2]} key heads"
    if any(t.stride(-1) != 1 for t in (q_BSHD, k_BLKD, v_BLKD) if t.shape[-1] > 1):
        return "a head has gaps"
    return None


def choose_launch(queries: int, heads: int, head_dim: int, itemsize: int, device: torch.device) -> FlashLaunch:
    """`queries`: of all sequences. The largest tile of queries that leaves no multiprocessor without a program; else
    the smallest that the matrix unit takes."""
    chip = gpu(device)
    if itemsize == 4:  # not on the matrix unit
        tile = 32 if head_dim <= 64 else 16
        return FlashLaunch(tile, tile, 4, 2)
    largest = 128 if head_dim <= 128 else 64
    rows = next((rows for rows in (128, 64, 32) if rows <= largest and queries * heads // rows >= chip.processors), 16)
    keys = 64 if head_dim <= 128 else 32
    stages = 3 if chip.dependent and head_dim <= 128 else 2  # older GPUs have 100 KiB of shared memory or less
    # Of 128 rows in 4 warps a bias, causal attention and padded heads spill (compiled for compute capability 9.0).
    return FlashLaunch(rows, keys, 8 if rows == 128 or head_dim > 128 else 4, stages)


def flash_attention(
    q_BSHD: torch.Tensor,
    k_BLKD: torch.Tensor,
    v_BLKD: torch.Tensor,
    *,
    scale: float,
    keys: Keys = ALL,
    lens_B: torch.Tensor | None = None,
    mask_BL: torch.Tensor | None = None,
    bias_BHSL: torch.Tensor | None = None,
    launch: FlashLaunch | None = None,
) -> torch.Tensor:
    """softmax(q k^T * scale + bias) v of padded sequences, [B, S, H, D], contiguous. Products and sums are in float32.

    `lens_B`, integers: only a sequence's first so many keys count. `mask_BL`, booleans or integers, or [1, L]: only
    keys where it is not 0. `bias_BHSL` is added to the scores, or hides keys where it is a False; each of its
    dimensions may be 1.

    On compute capability 9.0 and up it starts while the kernel before it on the stream still runs, and waits for that
    one's end before it reads or writes.
    """
    B, S = q_BSHD.shape[:2]
    out_BSHD = q_BSHD.new_empty(q_BSHD.shape)
    if out_BSHD.numel() == 0:
        return out_BSHD
    if bias_BHSL is not None:
        bias_BHSL = bias_BHSL.expand(B, q_BSHD.shape[2], S, k_BLKD.shape[1])
    launch = launch or choose_launch(B * S, q_BSHD.shape[2], q_BSHD.shape[3], q_BSHD.element_size(), q_BSHD.device)
    _launch(
        (q_BSHD, k_BLKD, v_BLKD),
        out_BSHD,
        (B, S, k_BLKD.shape[1], -(-S // launch.rows_a_tile) * B),
        scale,
        keys,
        bias_BHSL,
        launch,
        lens_B=lens_B,
        mask_BL=None if mask_BL is None else mask_BL.expand(B, k_BLKD.shape[1]),
    )
    return out_BSHD


def packed_attention(
    q_THD: torch.Tensor,
    k_UKD: torch.Tensor,
    v_UKD: torch.Tensor,
    starts_B: torch.Tensor,
    key_starts_B: torch.Tensor | None = None,
    *,
    scale: float,
    keys: Keys = ALL,
    bias_BHSL: torch.Tensor | None = None,
    place_T: torch.Tensor | None = None,
    launch: FlashLaunch | None = None,
) -> torch.Tensor:
    """The same of sequences packed one after the other, [T, H, D], contiguous: `starts_B`, int32 [B + 1], has where
    each begins in T and where the last one ends, `key_starts_B` where its keys do in U; None: the same. Tokens from the
    end of the last sequence on are neither read nor written.

    `place_T`, int32: where tokens were before something was left out between them, for self-attention. A window is of
    these places; without them, of those in T.

    Nothing waits for the starts to reach the host: T, and so the launch, may be any bound of the tokens there are. A
    bias counts positions from each sequence's first token; its S and L, where they are not 1, bound the longest.
    """
    out_THD = q_THD.new_empty(q_THD.shape)
    B = starts_B.shape[0] - 1
    if out_THD.numel() == 0 or B == 0:
        return out_THD
    if bias_BHSL is not None:
        bias_BHSL = bias_BHSL.expand(B, q_THD.shape[1], *bias_BHSL.shape[2:])
    T = q_THD.shape[0]
    launch = launch or choose_launch(T, q_THD.shape[1], q_THD.shape[2], q_THD.element_size(), q_THD.device)
    _launch(
        (q_THD[None], k_UKD[None], v_UKD[None]),
        out_THD[None],
        # At most: every sequence but one may fill its last tile with one row. What is left over ends at once.
        (B, 0, 0, T // launch.rows_a_tile + min(B, T)),
        scale,
        keys,
        bias_BHSL,
        launch,
        starts_B=starts_B,
        key_starts_B=starts_B if key_starts_B is None else key_starts_B,
        place_T=None if keys.window is None else place_T,
    )
    return out_THD


def _launch(
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    out_BSHD: torch.Tensor,
    sizes: tuple[int, int, int, int],  # sequences, queries and keys of each where not packed, tiles
    scale: float,
    keys: Keys,
    bias_BHSL: torch.Tensor | None,
    launch: FlashLaunch,
    *,
    lens_B: torch.Tensor | None = None,
    mask_BL: torch.Tensor | None = None,
    starts_B: torch.Tensor | None = None,
    key_starts_B: torch.Tensor | None = None,
    place_T: torch.Tensor | None = None,
) -> None:
    # Triton is optional, and its interpreter is chosen by the environment when this is first imported.
    import triton

    from paceline.kernels.flash_attention_triton import flash_kernel

    q_BSHD, k_BLKD, v_BLKD = tensors
    heads, dim = q_BSHD.shape[2:]
    B, S, L, tiles = sizes
    dependent = gpu(q_BSHD.device).dependent
    scanned = mask_BL is not None and launch.keys_a_tile < L <= MOST_SCANNED
    flash_kernel[(heads, tiles)](
        *tensors,
        out_BSHD,
        lens_B,
        as_bytes(mask_BL),
        as_bytes(bias_BHSL),
        starts_B,
        key_starts_B,
        place_T,
        B,
        S,
        L,
        keys.offset,
        float(scale),  # Triton would compile a kernel for the integer 1
        *q_BSHD.stride()[:3],
        *k_BLKD.stride()[:3],
        *v_BLKD.stride()[:3],
        *mask_strides(mask_BL, bias_BHSL),
        CAUSAL=keys.causal,
        WINDOW=-1 if keys.window is None else keys.window,
        BIAS=bias_kind(bias_BHSL),
        SCAN=triton.next_power_of_2(L) if scanned else 0,
        B_TILE=0 if starts_B is None else max(SEQUENCES, triton.next_power_of_2(B)),
        GROUP=heads // k_BLKD.shape[2],
        ROW_TILE=launch.rows_a_tile,
        KEY_TILE=launch.keys_a_tile,
        D=dim,
        D_TILE=max(16, triton.next_power_of_2(dim)),
        STAGES=launch.stages,
        DEPENDENT=dependent,
        num_warps=launch.warps,
        **launch_options(dependent),
    )


def bias_kind(bias_BHSL: torch.Tensor | None) -> str:
    """What the kernels do with a bias: BIAS of theirs."""
    return "none" if bias_BHSL is None else "mask" if bias_BHSL.dtype == torch.bool else "added"


def mask_strides(mask_BL: torch.Tensor | None, bias_BHSL: torch.Tensor | None) -> list[int]:
    """Of a mask's two dimensions and a bias's four; 0 where there is none, and along a bias's dimension of 1, which the
    longest sequence may exceed."""
    strides = [0, 0] if mask_BL is None else list(mask_BL.stride())
    if bias_BHSL is None:
        return [*strides, 0, 0, 0, 0]
    sizes = zip(bias_BHSL.shape, bias_BHSL.stride(), strict=True)
    return strides + [0 if size == 1 else stride for size, stride in sizes]


def flash_attention_ref(
    q_BSHD: torch.Tensor,
    k_BLKD: torch.Tensor,
    v_BLKD: torch.Tensor,
    *,
    scale: float,
    keys: Keys = ALL,
    lens_B: torch.Tensor | None = None,
    mask_BL: torch.Tensor | None = None,
    bias_BHSL: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same by products, a softmax and masks as large as the scores."""
    S, L = q_BSHD.shape[1], k_BLKD.shape[1]
    device = q_BSHD.device
    seen = _seen(keys, torch.arange(S, device=device), torch.arange(L, device=device))[None, None]
    if lens_B is not None:
        seen = seen & (torch.arange(L, device=device) < lens_B[:, None])[:, None, None]
    if mask_BL is not None:
        seen = seen & (mask_BL != 0)[:, None, None]
    return _attend_ref(q_BSHD, k_BLKD, v_BLKD, scale, seen, bias_BHSL)


def _attend_ref(
    q_BSHD: torch.Tensor,
    k_BLKD: torch.Tensor,
    v_BLKD: torch.Tensor,
    scale: float,
    seen: torch.Tensor,
    bias_BHSL: torch.Tensor | None,
) -> torch.Tensor:
    group = q_BSHD.shape[2] // k_BLKD.shape[2]
    k_BLHD, v_BLHD = (t.repeat_interleave(group, dim=2) for t in (k_BLKD, v_BLKD))
    scores_BHSL = torch.einsum("bshd,blhd->bhsl", q_BSHD, k_BLHD) * scale
    if bias_BHSL is not None and bias_BHSL.dtype == torch.bool:
        seen = seen & bias_BHSL
    elif bias_BHSL is not None:
        scores_BHSL = scores_BHSL + bias_BHSL
    scores_BHSL = scores_BHSL.masked_fill(~seen, -torch.inf)
    # Rows of -inf alone, which softmax makes NaN of.
    weights_BHSL = torch.softmax(scores_BHSL, dim=-1).masked_fill(~(scores_BHSL > -torch.inf).any(-1, True), 0.0)
    return torch.einsum("bhsl,blhd->bshd", weights_BHSL, v_BLHD).contiguous()


def packed_attention_ref(
    q_THD: torch.Tensor,
    k_UKD: torch.Tensor,
    v_UKD: torch.Tensor,
    starts_B: torch.Tensor,
    key_starts_B: torch.Tensor | None = None,
    *,
    scale: float,
    keys: Keys = ALL,
    bias_BHSL: torch.Tensor | None = None,
    place_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same, one sequence after the other; zeros after the last."""
    starts = starts_B.tolist()
    key_starts = starts if key_starts_B is None else key_starts_B.tolist()
    out_THD = torch.zeros_like(q_THD)
    for b in range(len(starts) - 1):
        rows, key_rows = slice(starts[b], starts[b + 1]), slice(key_starts[b], key_starts[b + 1])
        q_1SHD, k_1LKD, v_1LKD = q_THD[rows][None], k_UKD[key_rows][None], v_UKD[key_rows][None]
        bias = None
        if bias_BHSL is not None:
            bias = bias_BHSL[b % bias_BHSL.shape[0]][None, :, : q_1SHD.shape[1], : k_1LKD.shape[1]]
        if place_T is None:
            places = [torch.arange(x.shape[1], device=x.device) for x in (q_1SHD, k_1LKD)]
        else:
            places = [place_T[rows]] * 2
        out_THD[rows] = _attend_ref(q_1SHD, k_1LKD, v_1LKD, scale, _seen(keys, *places)[None, None], bias)[0]
    return out_THD


def _seen(keys: Keys, place_S: torch.Tensor, key_place_L: torch.Tensor) -> torch.Tensor:
    """[S, L]"""
    distance_SL = place_S[:, None] + keys.offset - key_place_L
    seen_SL = torch.ones_like(distance_SL, dtype=torch.bool)
    if keys.causal:
        seen_SL &= distance_SL >= 0
    if keys.window is not None:
        seen_SL &= distance_SL.abs() <= keys.window
    return seen_SL
