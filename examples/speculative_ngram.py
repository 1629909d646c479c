"""Draft tokens by looking them up in the text so far. The answer is the same, token by token; it takes fewer steps."""

from paceline import LLM, SamplingParams, SpeculativeConfig

code = "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n    return a - b\n\n"
params = SamplingParams(temperature=0, max_tokens=48)


def run(speculative_config: SpeculativeConfig | None) -> tuple[list[int], int]:
    with LLM(dtype="float32", speculative_config=speculative_config) as llm:
        steps = [list(update.outputs[0].token_ids) for update in llm.stream(code * 2 + "def add", params)]
    return [token for step in steps for token in step], len(steps)


plain_tokens, plain_steps = run(None)
tokens, steps = run(SpeculativeConfig(num_speculative_tokens=4))
assert tokens == plain_tokens
print(f"{len(tokens)} tokens in {steps} steps with drafts, {plain_steps} without")
