"""Steps captured in CUDA graphs, decodes and those with a few tokens of prompts: the host launches one graph where it
would launch some hundred kernels.

A step of 30 layers is 300 launches of some 4 us of host time each, and a small model's kernels take less than that.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch

from paceline.config import EngineConfig
from paceline.engine.decode_step import DecodeStep
from paceline.engine.prompt_step import PromptStep
from paceline.inputs import KVLayer
from paceline.kernels.choices import Choice, either
from paceline.kernels.decode_attention import decode_refusal
from paceline.layers.moe import MoE
from paceline.log import get_logger
from paceline.models.decoder import Decoder
from paceline.models.model import Model
from paceline.parallel.stage import Stage

log = get_logger(__name__)

# Larger steps are launched kernel by kernel: the device takes longer for them than the host.
MOST_ROWS = 256


def graph_rows(num_requests: int) -> int:
    """The size of the graph for so many requests: 1, 2, 4, 8, 16, 24 and on by 8. Unused rows cost next to nothing
    while a step's time is that of reading the weights."""
    if num_requests <= 8:
        return 1 << (num_requests - 1).bit_length()
    return -(-num_requests // 8) * 8


def config_refusal(*, mode: str = "auto", streamed: bool = False) -> str | None:
    """Why no CUDA device could run the decodes of any model as graphs; None where one could."""
    if mode == "eager":
        return "mode is 'eager'"
    if streamed:
        return "the weights are streamed"
    return None


def graph_refusal(model: Model, *, mode: str = "auto", streamed: bool = False) -> str | None:
    """Why this model's decodes cannot run as CUDA graphs; None when they can."""
    if mode == "eager":
        return "mode is 'eager'"
    if model.device.type != "cuda":
        return f"the device is {model.device.type}"
    if isinstance(model, Stage):
        return "the layers are split over devices"
    if not isinstance(model, Decoder):
        return "transformers' modules run the model"
    refusals = [decode_refusal(group.head_dim, model.dtype, model.device) for group in model.kv_groups]
    refusals += [moe.refusal(model.dtype, model.device) for moe in model.modules() if isinstance(moe, MoE)]
    return next(filter(None, [config_refusal(mode=mode, streamed=streamed), *refusals]), None)


def step_choices(model: Model, config: EngineConfig, rows: int, *, streamed: bool = False) -> Iterator[Choice]:
    """What a decode of so many requests runs, the model's part and the step around it."""
    yield from model.choices(rows)
    refusal = graph_refusal(model, mode=config.mode, streamed=streamed)
    if refusal is None and rows > min(MOST_ROWS, config.scheduler.max_num_seqs):
        refusal = f"graphs are for {min(MOST_ROWS, config.scheduler.max_num_seqs)} requests and fewer"
    # That of a step which does not wait for its tokens; any other chooses through torch.
    yield Choice("greedy choice", *either(refusal, "Triton argmax, in the graph", "torch"))
    yield Choice("launches", *either(refusal, "one CUDA graph", "kernel by kernel"))


def captured_decode(
    model: Model, config: EngineConfig, reserve: int, kv: Sequence[KVLayer], *, prompts: bool
) -> DecodeStep:
    """What runs a runner's plain decodes as graphs and, with `prompts`, its steps with a few tokens of prompts.
    `reserve`: bytes for their pool (sizing_cuda.reserved_bytes)."""
    if config.scheduler.max_num_seqs > MOST_ROWS:
        log.info("decodes of more than %d requests run without CUDA graphs", MOST_ROWS)
    rows, run = graph_rows(min(config.scheduler.max_num_seqs, MOST_ROWS)), Graphs(model.device, reserve).run
    block_size, context = config.cache.block_size, config.max_model_len
    few = None
    if prompts:
        assert isinstance(model, Decoder), "graph_refusal comes first"
        width = model.config.hidden_size
        few = PromptStep(model, kv, block_size, hidden_size=width, max_decodes=rows, max_model_len=context, run=run)
    return DecodeStep(
        model, kv, block_size, max_rows=rows, max_model_len=context, run=run, round_up=graph_rows, prompts=few
    )


class Graphs:
    """Captured steps, by what they were captured for (Decodes, Form), in one pool of memory: they never run at the same
    time, and nothing that one leaves there is read by another.

    The first step of its kind runs kernel by kernel, which loads what is loaded lazily, and is captured afterwards.
    `reserve`: bytes that the pool gets at once, so that graphs of all sizes share one segment.
    """

    def __init__(self, device: torch.device, reserve: int = 0) -> None:
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}
        self._device, self._reserve = device, reserve
        self._pool: Any = None
        self._keeper: torch.cuda.CUDAGraph | None = None  # the pool lasts as long as some graph that has it

    def run(self, key: Hashable, compute: Callable[[], None]) -> None:
        """Compute a step, whose inputs and results lie in buffers that never move."""
        graph = self._graphs.get(key)
        if graph is not None:
            graph.replay()
            return
        compute()
        if key not in self._graphs:
            self._graphs[key] = self._capture(key, compute)

    def _capture(self, key: Hashable, compute: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        """None where that fails, for lack of memory say: such steps then run kernel by kernel for good."""
        try:
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
                self._keeper = self._record(self._fill) if self._reserve else None
            return self._record(compute)
        except RuntimeError as error:
            log.warning("%s run without a CUDA graph: %s", key, str(error).partition("\n")[0])
            return None

    def _record(self, compute: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # Another thread (a server's, a tokenizer's) may use the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            compute()
        return graph

    def _fill(self) -> None:
        torch.empty(self._reserve, dtype=torch.uint8, device=self._device)[:1].zero_()  # an empty graph is warned of
