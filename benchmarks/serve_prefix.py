"""What a shared system prompt of 1,500 tokens costs the requests after the first that has it: time to first token.

    python benchmarks/serve_prefix.py                         the default model, on the CPU
    python benchmarks/serve_prefix.py --rounds 10 -- --threads 2 --dtype float32    what follows -- is for `serve`

Each round has a system prompt of its own, which the first request brings and five others, with other questions, share.
"""

from __future__ import annotations

import argparse
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import httpx

SYSTEM_TOKENS, OTHERS = 1500, 5


def system_prompt(client: httpx.Client, round_number: int) -> str:
    """Words at random, SYSTEM_TOKENS tokens of them by the server's own count."""
    draw = random.Random(round_number)
    words = [
        f"{draw.choice(['red', 'green', 'blue', 'old', 'new'])} {draw.randrange(1000)}" for _ in range(SYSTEM_TOKENS)
    ]
    tokens = client.post("/tokenize", json={"prompt": " ".join(words)}).raise_for_status().json()["tokens"]
    text: str = client.post("/detokenize", json={"tokens": tokens[:SYSTEM_TOKENS]}).raise_for_status().json()["prompt"]
    return text


def first_token_seconds(client: httpx.Client, system: str, question: str) -> tuple[float, int]:
    """From sending a request to its first piece of text, and the tokens of its prompt that were cached."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    body = {"messages": messages, "max_tokens": 4, "temperature": 0, "stream": True}
    body["stream_options"] = {"include_usage": True}
    seconds = cached = 0.0
    begun = time.perf_counter()
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not seconds and re.search(r'"content":"[^"]', line):
                seconds = time.perf_counter() - begun
            if found := re.search(r'"cached_tokens":(\d+)', line):
                cached = int(found.group(1))
    return seconds, int(cached)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("serve", nargs="*", help="arguments of `paceline serve`")
    options = parser.parse_args()
    command = [sys.executable, "-m", "paceline", "serve", *options.serve, "--port", "0"]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as stderr:
            server = subprocess.Popen(command, stderr=stderr)
        try:
            while not (found := re.search(r" on (http://\S+)/v1", log.read_text())):
                if server.poll() is not None:
                    raise RuntimeError(log.read_text())
                time.sleep(0.05)
            with httpx.Client(base_url=found.group(1), timeout=600) as client:
                while client.get("/health").status_code != 200:
                    time.sleep(0.05)
                measure(client, options.rounds)
        finally:
            server.terminate()
            server.wait()


def measure(client: httpx.Client, rounds: int) -> None:
    first_token_seconds(client, "You are brief.", "Hello?")  # warms up
    first, later, cached = [], [], []
    for number in range(rounds):
        system = system_prompt(client, number)
        first.append(first_token_seconds(client, system, "Who are you?")[0])
        for other in range(OTHERS):
            seconds, tokens = first_token_seconds(client, system, f"Question {other}: what is {other} times seven?")
            later.append(seconds)
            cached.append(tokens)
    print(f"a system prompt of {SYSTEM_TOKENS} tokens, {rounds} rounds, median time to first token:")
    print(f"first request {1000 * median(first):.0f} ms; later ones {1000 * median(later):.0f} ms, ", end="")
    print(f"{median(later) / median(first):.3f} of it, with {min(cached)} to {max(cached)} tokens cached")


if __name__ == "__main__":
    main()
