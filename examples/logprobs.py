"""How sure the model was: each chosen token beside its likeliest alternatives, in raw log probabilities."""

import math

from paceline import LLM, SamplingParams

with LLM() as llm:
    (result,) = llm.generate("2 + 2 =", SamplingParams(temperature=0, max_tokens=6, logprobs=3))

answer = result.outputs[0]
for token_id, candidates in zip(answer.token_ids, answer.logprobs, strict=True):
    shares = (f"{entry.decoded_token!r} {math.exp(entry.logprob):.1%}" for entry in candidates.values())
    print(f"{candidates[token_id].decoded_token!r:12}", *shares, sep="  ")
