"""Two turns through the model's chat template. The second finds the first in the prefix cache."""

from paceline import LLM, SamplingParams

params = SamplingParams(temperature=0, max_tokens=40)
messages = [
    {"role": "system", "content": "You answer in one short sentence."},
    {"role": "user", "content": "What is the capital of France?"},
]

with LLM() as llm:
    (first,) = llm.chat(messages, params)
    messages += [
        {"role": "assistant", "content": first.outputs[0].text},
        {"role": "user", "content": "And of Italy?"},
    ]
    (second,) = llm.chat(messages, params)

for result in (first, second):
    print(result.outputs[0].text)
print(f"{second.num_cached_tokens} of the second turn's {len(second.prompt_token_ids)} prompt tokens were cached")
