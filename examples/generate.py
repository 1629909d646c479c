"""Continue a text: the shortest program."""

from paceline import LLM, SamplingParams

with LLM() as llm:  # SmolLM2-135M-Instruct, fetched on first use
    (result,) = llm.generate("The three primary colours are", SamplingParams(temperature=0, max_tokens=24))

print(result.prompt + result.outputs[0].text)
