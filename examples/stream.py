"""Print an answer as it is made, and how long the first token took."""

from paceline import LLM, SamplingParams

with LLM() as llm:
    question = [{"role": "user", "content": "Why is the sky blue?"}]
    for update in llm.stream(question, SamplingParams(temperature=0, max_tokens=60)):
        print(update.outputs[0].text, end="", flush=True)  # only what is new

print(f"\nfirst token after {update.metrics.time_to_first_token:.3f} s, ended by {update.outputs[0].finish_reason}")
