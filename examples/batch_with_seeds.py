"""Many prompts at once, each with its own parameters. A seed gives the same text alone and in any batch."""

from paceline import LLM, SamplingParams

prompts = ["Once upon a time", "The recipe begins with", "In the year 2150,"]
params = [SamplingParams(temperature=0.8, top_p=0.95, seed=seed, max_tokens=24) for seed in range(len(prompts))]

with LLM(dtype="float32") as llm:
    together = llm.generate(prompts, params)
    alone = [llm.generate(prompt, one)[0] for prompt, one in zip(prompts, params, strict=True)]

for one, other in zip(together, alone, strict=True):
    assert one.outputs[0].token_ids == other.outputs[0].token_ids
    print(repr(one.prompt + one.outputs[0].text))
