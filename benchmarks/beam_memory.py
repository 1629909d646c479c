"""What the cache holds for beams: blocks that a beam search shares, against separate sequences of the same lengths.

    python benchmarks/beam_memory.py --model MODEL --width 8 --prompt 100 --tokens 1000

Two savings are told apart: sharing the prompt alone (any n answers to one prompt have it), and what beams share of the
tokens they generate, because they descend from common ancestors. The prefix cache is off: what counts is what requests
hold. Both are shares of what separate sequences need.
"""

from __future__ import annotations

import argparse

from paceline import LLM, SamplingParams
from paceline.engine.engine import EngineRequest

TEXT = (
    "The history of computing is longer than that of the machines we now call computers. It begins with methods for "
    "counting, with tables of results worked out by hand, and with devices that helped a person to do arithmetic. "
)


def measure(llm: LLM, prompt: list[int], width: int, total: int) -> list[tuple[int, int]]:
    """(tokens of each beam, blocks in use) after every step of one search."""
    engine = llm.model.engine
    params = SamplingParams(
        use_beam_search=True,
        n=width,
        max_tokens=total - len(prompt),
        ignore_eos=True,
    )
    engine.add_request(EngineRequest("beams", prompt, params))
    counts: list[tuple[int, int]] = []
    while engine.has_work:
        output = engine.scheduler.schedule()
        if output.scheduled:
            share = output.scheduled[0]
            counts.append((share.start + len(share.token_ids), engine.scheduler.stats.cache.used_blocks[0]))
        engine.scheduler.update(output, engine.runner.run(output))
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=100, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=1000, help="tokens in all, prompt included")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--block-size", type=int, default=16)
    options = parser.parse_args()
    size, width = options.block_size, options.width
    with LLM(
        options.model,
        dtype=options.dtype,
        max_model_len=options.tokens + 1,
        max_num_seqs=width,
        num_blocks=width * (options.tokens // size + 2),
        block_size=size,
        enable_prefix_caching=False,
    ) as llm:
        text = llm.get_tokenizer().encode(TEXT * (options.prompt // 20 + 1))
        counts = measure(llm, text[: options.prompt], width, options.tokens)
    print(
        f"{'tokens':>8}{'separate':>10}{'prompt shared':>15}{'beams':>8}{'saved':>8}{'by prompt':>11}{'by beams':>10}"
    )
    for tokens, used in counts:
        shown = {options.prompt + 1, *range(0, options.tokens, options.tokens // 10), counts[-1][0]}
        if tokens > options.prompt and tokens in shown:
            separate = width * -(-tokens // size)
            shared = separate - (width - 1) * (options.prompt // size)
            by_prompt, by_beams = 1 - shared / separate, (shared - used) / separate
            saved = by_prompt + by_beams
            print(f"{tokens:8}{separate:10}{shared:15}{used:8}{saved:8.1%}{by_prompt:11.1%}{by_beams:10.1%}")


if __name__ == "__main__":
    main()
