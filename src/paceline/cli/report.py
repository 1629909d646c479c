"""What a generation cost: the line of figures on stderr, and the JSON object of `--json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from paceline.sampling.params import SamplingParams

if TYPE_CHECKING:
    from paceline.benchmark.mbu import DecodeFigures
    from paceline.outputs import RequestOutput


@dataclass(frozen=True)
class Answer:
    """One finished answer. `num_steps`: forward passes that gave tokens; fewer than tokens when drafts were accepted.
    `last`: the stream's last value, for the prompt, the times and why it ended."""

    text: str
    token_ids: Sequence[int]
    num_steps: int
    last: RequestOutput


@dataclass(frozen=True)
class Report:
    """An answer, what it ran on and what it cost. `sources`: parameter -> where its value came from, where that is
    not SamplingParams' default. `phases`: seconds of each part from the process's start to the first token, in order.
    `figures` is None where fewer than two steps leave no decode to time."""

    model: str
    revision: str | None
    implementation: str  # "paceline" or "transformers": whose modules ran
    dtype: str
    device: str
    answer: Answer
    params: SamplingParams
    sources: Mapping[str, str]
    load_seconds: float
    phases: Mapping[str, float]
    figures: DecodeFigures | None


def final_line(report: Report) -> str:
    """One line: model, tokens, TTFT, tokens/s, GB/s of the device's GB/s and their ratio (MBU)."""
    parts = cost_parts(report.answer, report.params, report.figures)
    return " · ".join([f"{report.model} {report.dtype} {report.device}", *parts])


def cost_parts(answer: Answer, params: SamplingParams, figures: DecodeFigures | None) -> list[str]:
    """What an answer cost, and whether it was cut off, in the order of `final_line`."""
    last = answer.last
    ttft = last.metrics.time_to_first_token
    parts = [
        f"{len(last.prompt_token_ids)} + {len(answer.token_ids)} tokens",
        f"TTFT {ttft:.2f} s" if ttft is not None else "no token",
    ]
    if figures is not None:
        parts.append(f"{figures.tokens_per_second:.1f} tokens/s")
        parts.append(
            f"{figures.bytes_per_second / 1e9:.1f} of {figures.bandwidth / 1e9:.1f} GB/s (MBU {figures.mbu:.0%})"
        )
    if last.outputs[0].finish_reason == "length":
        limit = params.max_tokens
        at_limit = limit is not None and len(answer.token_ids) >= limit
        parts.append(f"cut off by --max-tokens {limit}" if at_limit else "cut off where the context ends")
    return parts


def json_report(report: Report) -> dict[str, Any]:
    """The whole report as JSON values; times in seconds, bandwidths in bytes a second."""
    answer, last, figures = report.answer, report.answer.last, report.figures
    output = last.outputs[0]
    return {
        "model": report.model,
        "revision": report.revision,
        "implementation": report.implementation,
        "dtype": report.dtype,
        "device": report.device,
        "prompt": last.prompt,
        "prompt_tokens": len(last.prompt_token_ids),
        "cached_tokens": last.num_cached_tokens,
        "text": answer.text,
        "token_ids": list(answer.token_ids),
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
        "sampling_params": effective_params(report.params, report.sources),
        "load_seconds": report.load_seconds,
        "phases": dict(report.phases),
        "ttft_seconds": last.metrics.time_to_first_token,
        "tokens_per_second": figures and figures.tokens_per_second,
        "bytes_per_second": figures and figures.bytes_per_second,
        "device_bytes_per_second": figures and figures.bandwidth,
        "mbu": figures and figures.mbu,
    }


def effective_params(params: SamplingParams, sources: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Every sampling parameter's value and where it came from: request, generation_config or default."""
    return {
        field.name: {
            "value": _json_value(getattr(params, field.name)),
            "source": sources.get(field.name, "default"),
        }
        for field in dataclasses.fields(params)
    }


def _json_value(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value
