"""1,000 texts of mixed length embedded on this CPU, beside sentence-transformers, in one process and in turns.

Where that package is not installed, its own way stands for it, over plain transformers: texts sorted by their length in
characters, batches of 32, each padded to its longest, in float32. Both read the same files and cut at the same length;
every rate is the median of the rounds, in texts a second, tokenization included.

    python benchmarks/embeddings_cpu.py --threads 2 --rounds 3
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from paceline import LLM
from paceline.loading.resolve import resolve

BATCH = 32  # sentence-transformers' default
WORDS = (3, 200)  # of a text, uniform
Encode = Callable[[list[str]], np.ndarray]


def make_texts(directory: Path, count: int) -> list[str]:
    """Texts of whole words of the vocabulary, so that a word is a token."""
    vocabulary = json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]
    words = [word for word in vocabulary if word.isascii() and word.isalpha()]
    draw = random.Random(0)
    return [" ".join(draw.choices(words, k=draw.randint(*WORDS))) for _ in range(count)]


def sentence_transformers_way(directory: Path, dtype: torch.dtype) -> tuple[str, Encode]:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        return f"its way over transformers, {short(dtype)}", Padded(directory, dtype)
    model = SentenceTransformer(str(directory), device="cpu", model_kwargs={"dtype": dtype})
    return f"sentence-transformers, {short(dtype)}", lambda texts: model.encode(texts, batch_size=BATCH)


class Padded:
    """What SentenceTransformer.encode does."""

    def __init__(self, directory: Path, dtype: torch.dtype) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        self.model = transformers.AutoModel.from_pretrained(directory, dtype=dtype).eval()
        self.longest = json.loads((directory / "sentence_bert_config.json").read_text())["max_seq_length"]

    @torch.inference_mode()
    def __call__(self, texts: list[str]) -> np.ndarray:
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        made: list[Any] = [None] * len(texts)
        for start in range(0, len(order), BATCH):
            places = order[start : start + BATCH]
            read = self.tokenizer(
                [texts[i] for i in places], padding=True, truncation=True, max_length=self.longest, return_tensors="pt"
            )
            hidden_BLD = self.model(**read).last_hidden_state
            mask_BL1 = read["attention_mask"][..., None]
            mean_BD = (hidden_BLD * mask_BL1).sum(1) / mask_BL1.sum(1).clamp(min=1e-9)
            rows = torch.nn.functional.normalize(mean_BD.float(), dim=-1)
            for place, row in zip(places, rows, strict=True):
                made[place] = row.numpy()
        return np.stack(made)


def paceline_way(directory: Path, dtype: str, budget: int) -> tuple[str, Encode]:
    llm = LLM(str(directory), dtype=dtype, device="cpu", max_num_batched_tokens=budget, max_num_seqs=min(budget, 256))

    def encode(texts: list[str]) -> np.ndarray:
        return np.array([output.outputs.embedding for output in llm.embed(texts, truncate_prompt_tokens=-1)])

    return f"paceline, {short(llm.encoder.loaded.encoder.dtype)}", encode


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="all-minilm-l6-v2")
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="auto", help="paceline's")
    parser.add_argument("--budget", type=int, default=2048, help="tokens of a batch of paceline's")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    directory = resolve(options.model).path
    texts = make_texts(directory, options.texts)
    ways = [
        sentence_transformers_way(directory, torch.float32),
        sentence_transformers_way(directory, torch.bfloat16),
        paceline_way(directory, options.dtype, options.budget),
    ]
    times: dict[str, list[float]] = {name: [] for name, _ in ways}
    made: dict[str, np.ndarray] = {}
    for _, encode in ways:
        encode(texts[: 4 * BATCH])
    for _ in range(options.rounds):
        for name, encode in ways:
            start = time.perf_counter()
            made[name] = encode(texts)
            times[name].append(time.perf_counter() - start)
    exact = made[ways[0][0]]
    for name, seconds in times.items():
        rate = len(texts) / statistics.median(seconds)
        times_first = statistics.median(times[ways[0][0]]) / statistics.median(seconds)
        cosine = float((made[name] * exact).sum(-1).min())
        print(f"{name:40} {rate:8.1f} texts/s  {times_first:5.2f}x  least cosine {cosine:.6f}")


if __name__ == "__main__":
    main()
