"""What the host does for one step of many requests, part by part, with a model that costs nothing.

python benchmarks/host_time.py                       batches of 1, 64 and 256, greedy, on the CPU
python benchmarks/host_time.py --batch 256 --kind filtered --profile

Figures are microseconds of this thread's CPU time (other processes do not count), the median over the steps and, in
parentheses, the 90th percentile. "mixed" is a step of which one share is a prompt's chunk: what its inputs cost, with
the sampler's work, which a GPU would do. Nothing stands for the kernels of a model, or for the replay of their graph.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from paceline.config import CacheConfig, EngineConfig, KVGroup, SchedulerConfig
from paceline.engine.decode_step import DecodeStep
from paceline.engine.engine import Engine, EngineRequest
from paceline.engine.model_runner import ModelRunner
from paceline.engine.output import RequestState
from paceline.engine.step import RequestUpdate
from paceline.sampling.params import SamplingParams
from paceline.tokens.parts import TokenizerParts
from paceline.tokens.tokenizer import Tokenizer

BLOCK, MAX_LEN, CHUNK = 16, 2048, 1024
VOCAB = 256  # one a byte
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "drawn": {"temperature": 1.0},
    "filtered": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
}
PARTS = ("schedule", "launch", "collect", "update", "text")


class Instant:
    """A model that computes nothing: every row has the same logits."""

    dtype, device, vocab_size = torch.float32, torch.device("cpu"), VOCAB
    kv_groups = (KVGroup("full", (0,), None, 1, 1),)

    def __init__(self) -> None:
        self._logits_TV = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0)).repeat(CHUNK + 512, 1)

    def choices(self, rows: int) -> Iterator[Any]:
        return iter(())

    def __call__(self, inputs: Any, kv: Any) -> torch.Tensor:
        return self._logits_TV[: len(inputs.token_ids_T)]

    def logits(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        return hidden_TD


def byte_tokenizer() -> Tokenizer:
    """One token a byte, spelled as GPT-2 spells them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(TokenizerParts(backend, frozenset(), {}, {}))


def _replay(key: Any, compute: Callable[[], None]) -> None:
    """A graph whose replay costs nothing: rows choose again what they chose."""


class Bench:
    """An engine of `batch` requests, and what each part of a step takes."""

    def __init__(self, batch: int, params: SamplingParams, *, depth: int) -> None:
        blocks = (batch + 8) * MAX_LEN // BLOCK
        config = EngineConfig(
            max_model_len=MAX_LEN,
            cache=CacheConfig(BLOCK, blocks),
            scheduler=SchedulerConfig(batch + 1, CHUNK + batch + 1),
            async_depth=depth,
        )
        model: Any = Instant()

        def decode(kv: Any) -> DecodeStep:
            return DecodeStep(model, kv, BLOCK, max_rows=batch, max_model_len=MAX_LEN, run=_replay)

        self.engine = Engine(config, model.kv_groups, (blocks,), ModelRunner(model, (blocks,), BLOCK, decode))
        self.params, self.depth = params, depth
        self.tokenizer = byte_tokenizer()
        self.states: dict[str, RequestState] = {}
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self._flight: list[tuple[Any, Any]] = []
        self._draw = random.Random(0)

    def add(self, name: str, length: int) -> None:
        """The texts that are made end where the request does, not with a stop string."""
        prompt = [self._draw.randrange(VOCAB) for _ in range(length)]
        self.engine.add_request(EngineRequest(name, prompt, self.params))
        self.states[name] = RequestState(name, None, prompt, self.params, self.tokenizer, chat=False)

    @contextmanager
    def _time(self, part: str) -> Iterator[None]:
        start = time.thread_time()
        yield
        self.seconds[part].append(time.thread_time() - start)

    def step(self) -> None:
        """What Engine.step and LLM._step do, timed."""
        engine = self.engine
        with self._time("schedule"):
            output = engine.scheduler.schedule()
        with self._time("launch"):
            launched = engine.runner.launch(output)
        self._flight.append((output, launched))
        left = 0 if launched.done else self.depth
        while len(self._flight) > left:
            output, launched = self._flight.pop(0)
            with self._time("collect"):
                result = engine.runner.collect(launched)
            with self._time("update"):
                updates = engine.scheduler.update(output, result)
            with self._time("text"):
                self._tell(updates)

    def _tell(self, updates: Sequence[RequestUpdate]) -> None:
        for update in updates:
            self.states[update.request_id].apply(0, update)

    def settle(self, requests: int) -> None:
        """Run until all requests decode."""
        for _ in range(4 * requests):
            self.step()
        assert self.engine.scheduler.num_waiting == 0
        self.seconds.clear()


def measure_decodes(bench: Bench, steps: int) -> None:
    for _ in range(steps):
        bench.step()


def measure_mixed(bench: Bench, steps: int) -> None:
    """Beside the decodes, each step computes all of a prompt of CHUNK tokens, whose request then goes."""
    for index in range(steps):
        bench.add(f"prompt {index}", CHUNK)
        bench.step()
        bench.engine.abort(f"prompt {index}")


def report(name: str, batch: int, seconds: dict[str, list[float]]) -> None:
    cells, total = [], 0.0
    for part in PARTS:
        middle, high = statistics.median(seconds[part]), statistics.quantiles(seconds[part], n=10)[-1]
        total += middle
        cells.append(f"{part} {middle * 1e6:6,.0f} ({high * 1e6:,.0f})")
    engine = total - statistics.median(seconds["text"])
    print(
        f"{name:8} {batch:4}  " + "  ".join(cells) + f"  engine {engine * 1e6:,.0f}  all {total * 1e6:,.0f}", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--kind", choices=list(KINDS), default="greedy")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--depth", type=int, default=1, help="steps that are launched ahead")
    parser.add_argument("--profile", action="store_true", help="print where the time goes (which slows all of it)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    params = SamplingParams(max_tokens=MAX_LEN, seed=1, ignore_eos=True, **KINDS[options.kind])
    measures: dict[str, tuple[Callable[[Bench, int], None], int]] = {
        "decode": (measure_decodes, options.steps),
        "mixed": (measure_mixed, max(20, options.steps // 10)),
    }
    for batch in options.batch:
        bench = Bench(batch, params, depth=options.depth)
        for index in range(batch):
            bench.add(f"request-{index}", 64 + index * 37 % 512)  # blocks are filled at different steps
        bench.settle(batch)
        for name, (measure, steps) in measures.items():
            profile = cProfile.Profile() if options.profile else None
            if profile is not None:
                profile.enable()
            measure(bench, steps)
            if profile is not None:
                profile.disable()
                pstats.Stats(profile).sort_stats("tottime").print_stats(25)
            report(name, batch, bench.seconds)
            bench.seconds.clear()


if __name__ == "__main__":
    main()
