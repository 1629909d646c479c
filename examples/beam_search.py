"""Beam search: the four likeliest continuations, best first, and the score that ranks them."""

from paceline import LLM, BeamSearchParams

with LLM() as llm:
    (result,) = llm.beam_search("The capital of France is", BeamSearchParams(beam_width=4, max_tokens=12))

for answer in result.outputs:
    print(f"{answer.score:7.3f}  {answer.text!r}")
