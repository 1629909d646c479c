"""What a user asks of sampling. Names, defaults and ranges are vLLM's `SamplingParams`; no torch here.

Where vLLM bends a value to fit (a logit bias of 1e9 becomes 100) we refuse it: nothing is changed silently.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

from paceline.errors import UsageError
from paceline.registry import refuse_unknown_keys

GREEDY_BELOW = 1e-5  # a temperature under this means greedy
LOGIT_BIAS_LIMIT = 100.0  # OpenAI's range; at 100 a token is certain or impossible already
# What a request fails with whose own parameters leave it nothing: the user's doing, not the model's.
NO_TOKEN_LEFT = (
    "no token is left to choose: allowed_token_ids, bad_words, min_tokens, logit_bias and the penalties together leave "
    "none with a finite logit"
)
LENGTH_PENALTY_LIMIT = 10.0  # a million tokens to the power of 10 is still a float


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen and when it stops.

    `max_tokens` None runs to the model's own end or the context's. `top_k` 0 or -1, `top_p` 1, `min_p` 0 and
    `typical_p` 1 are off. `seed` None draws one from the engine's seed; a request with a seed gets the same text
    whatever else is in the batch. `logprobs` k returns the k likeliest tokens' raw log probabilities beside the
    chosen token's; -1 returns the whole vocabulary's, as does a k beyond it. `prompt_logprobs` k: the same of every
    prompt token but the first, which nothing precedes. `echo` begins each answer's text, token ids and log
    probabilities with the prompt's, as OpenAI's /v1/completions does; with `logprobs` it implies prompt_logprobs of
    as many. `max_tokens` 0 computes the prompt and chooses nothing; it needs one of the two.

    `best_of` makes so many answers and returns the `n` best. Sampled answers are ranked by their score, the sum of
    their tokens' raw log probabilities / length ** length_penalty: 1 ranks by the mean (OpenAI's best_of), 0 by the sum
    (vLLM's). `use_beam_search` searches with `best_of` (or `n`) beams as transformers does; engine/beams.py says how,
    and what `length_penalty` and `early_stopping` do there. Both are told at their end only, streamed or not.

    Raises UsageError, naming the parameter and its range, for a value out of range or of the wrong type.
    """

    n: int = 1
    best_of: int | None = None
    use_beam_search: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] = ()
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    echo: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None  # keep only the prompt's last k tokens; never done unless asked
    priority: int = 0  # smaller is served earlier, under the "priority" policy

    def __post_init__(self) -> None:
        # Sequences become tuples, so that a caller's later change of a list changes nothing here.
        for name, value in _checked_fields(self).items():
            object.__setattr__(self, name, value)
        _check_together(self)

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def num_prompt_logprobs(self) -> int | None:
        """The k of the prompt's log probabilities, asked for by name or by echo with logprobs; None: not wanted."""
        if self.prompt_logprobs is not None:
            return self.prompt_logprobs
        return self.logprobs if self.echo else None

    @property
    def width(self) -> int:
        """Sequences made at once, of which the n best are returned: beams, or sampled answers."""
        return self.best_of or self.n

    @property
    def num_answers(self) -> int:
        """Answers that the engine reports: all that are sampled, but only the n best of the beams."""
        return self.n if self.use_beam_search else self.width

    @property
    def is_ranked(self) -> bool:
        """Whether the answers are ranked by a score, so that none can be shown before all have ended."""
        return self.use_beam_search or self.width > self.n

    @property
    def num_logprobs(self) -> int | None:
        """Log probabilities that the sampler is to return: `logprobs`, or the chosen token's where a rank needs it."""
        return 0 if self.logprobs is None and self.is_ranked else self.logprobs

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> SamplingParams:
        """Parameters from JSON's types: unknown keys are refused with the nearest known name, and the token ids
        that key `logit_bias` may be strings of digits, the only keys JSON has."""
        refuse_unknown_keys("sampling parameter", given, FIELD_NAMES)
        fields = dict(given)
        bias = fields.get("logit_bias")
        if isinstance(bias, Mapping):
            fields["logit_bias"] = {_json_token_id(key): value for key, value in bias.items()}
        return cls(**fields)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise a UsageError for a token id that the model does not have. The sampler trusts its ids: on a GPU
        one outside the vocabulary would end the whole process, so this belongs where a request is admitted."""
        for name in ("logit_bias", "allowed_token_ids", "stop_token_ids"):
            for token in getattr(self, name) or ():
                if token >= vocab_size:
                    raise UsageError(f"{name} holds token id {token}, but the vocabulary ends at {vocab_size - 1}")


@dataclass(frozen=True)
class BeamSearchParams:
    """What `LLM.beam_search` takes, under vLLM's names. All `beam_width` answers are returned, best first."""

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0

    def sampling_params(self) -> SamplingParams:
        """The same as SamplingParams. Raises UsageError as they do, and for a beam_width below 2."""
        return SamplingParams(
            n=_integer("beam_width", self.beam_width, 2, ": one beam is greedy decoding (temperature=0)"),
            use_beam_search=True,
            max_tokens=self.max_tokens,
            ignore_eos=self.ignore_eos,
            temperature=self.temperature,
            length_penalty=self.length_penalty,
        )


FIELD_NAMES = tuple(field.name for field in dataclasses.fields(SamplingParams))


# ------------------------------------------------------------------------- defaults of generation_config.json

# What only sampling reads, and the values at which it changes nothing.
_SAMPLING_ONLY: dict[str, tuple[float, ...]] = {
    "temperature": (0.0, 1.0),
    "top_k": (0, -1),
    "top_p": (1.0,),
    "min_p": (0.0,),
    "typical_p": (1.0,),
}
_GENERATION_CONFIG_FIELDS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def generation_defaults(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling parameters that a model's generation_config.json sets, under our names. `do_sample` false, when
    it is written out, means greedy; absent it says nothing, as most files that give a temperature leave it out."""
    defaults = {
        ours: generation_config[theirs]
        for theirs, ours in _GENERATION_CONFIG_FIELDS.items()
        if generation_config.get(theirs) is not None
    }
    if generation_config.get("do_sample") is False:
        defaults["temperature"] = 0.0
    return defaults


def with_defaults(
    given: SamplingParams | Mapping[str, Any] | None, generation_config: Mapping[str, Any]
) -> tuple[SamplingParams, list[str]]:
    """The parameters to use, and the names of those that came from generation_config.json.

    The model's values apply where the user said nothing, and only a mapping (an HTTP body, command line options)
    or None (no parameters at all) can say nothing of a field: a SamplingParams object is complete and is used as
    it stands, as in vLLM. So no object has to remember which of its fields were typed and which defaulted. A request
    for beams leaves aside the model's values that are for sampling. Raises UsageError, for the model's values too.
    """
    if isinstance(given, SamplingParams):
        return given, []
    defaults = generation_defaults(generation_config)
    try:
        SamplingParams(**defaults)
    except UsageError as error:
        raise UsageError(f"the model's generation_config.json is wrong: {error}") from None
    fields = dict(given or {})
    if fields.get("use_beam_search") is True:
        defaults = {name: value for name, value in defaults.items() if name not in _SAMPLING_ONLY}
    taken = [name for name in defaults if name not in fields]
    return SamplingParams.from_dict({**defaults, **fields}), taken


# -------------------------------------------------------------------------------------------------- validation


def _checked_fields(params: SamplingParams) -> dict[str, Any]:
    """Every field that needs a check, checked on its own and brought to one type."""
    return {
        "n": _integer("n", params.n, 1),
        "best_of": _optional_integer("best_of", params.best_of, 1),
        "use_beam_search": _boolean("use_beam_search", params.use_beam_search),
        "length_penalty": _number(
            "length_penalty",
            params.length_penalty,
            f"in [-{LENGTH_PENALTY_LIMIT:g}, {LENGTH_PENALTY_LIMIT:g}]",
            lambda x: -LENGTH_PENALTY_LIMIT <= x <= LENGTH_PENALTY_LIMIT,
        ),
        "early_stopping": _early_stopping(params.early_stopping),
        "temperature": _number("temperature", params.temperature, "at least 0", lambda x: x >= 0),
        "top_k": _integer("top_k", params.top_k, -1, "; 0 or -1 is off"),
        "top_p": _number("top_p", params.top_p, "in (0, 1]", lambda x: 0 < x <= 1),
        "min_p": _number("min_p", params.min_p, "in [0, 1]", lambda x: 0 <= x <= 1),
        "typical_p": _number("typical_p", params.typical_p, "in (0, 1]", lambda x: 0 < x <= 1),
        "repetition_penalty": _number(
            "repetition_penalty", params.repetition_penalty, "greater than 0", lambda x: x > 0
        ),
        "presence_penalty": _number("presence_penalty", params.presence_penalty, "in [-2, 2]", lambda x: -2 <= x <= 2),
        "frequency_penalty": _number(
            "frequency_penalty", params.frequency_penalty, "in [-2, 2]", lambda x: -2 <= x <= 2
        ),
        "logit_bias": _logit_bias(params.logit_bias),
        "allowed_token_ids": None
        if params.allowed_token_ids is None
        else _not_empty("allowed_token_ids", _token_ids("allowed_token_ids", params.allowed_token_ids)),
        "bad_words": _strings("bad_words", params.bad_words),
        "seed": _optional_integer("seed", params.seed, -(2**63), 2**64 - 1),
        "max_tokens": _optional_integer("max_tokens", params.max_tokens, 0),
        "min_tokens": _integer("min_tokens", params.min_tokens, 0),
        "stop": _strings("stop", params.stop),
        "stop_token_ids": _token_ids("stop_token_ids", params.stop_token_ids),
        "include_stop_str_in_output": _boolean("include_stop_str_in_output", params.include_stop_str_in_output),
        "ignore_eos": _boolean("ignore_eos", params.ignore_eos),
        "logprobs": _optional_integer("logprobs", params.logprobs, -1),
        "prompt_logprobs": _optional_integer("prompt_logprobs", params.prompt_logprobs, -1),
        "echo": _boolean("echo", params.echo),
        "detokenize": _boolean("detokenize", params.detokenize),
        "skip_special_tokens": _boolean("skip_special_tokens", params.skip_special_tokens),
        "spaces_between_special_tokens": _boolean(
            "spaces_between_special_tokens", params.spaces_between_special_tokens
        ),
        "truncate_prompt_tokens": _optional_integer("truncate_prompt_tokens", params.truncate_prompt_tokens, 1),
        "priority": _integer("priority", params.priority, None),
    }


def _check_together(params: SamplingParams) -> None:
    """The rules that tie two parameters."""
    if params.max_tokens == 0 and params.is_ranked:
        raise UsageError("max_tokens 0 makes no answers to rank: leave out best_of and use_beam_search, or raise it")
    if params.max_tokens == 0 and not params.echo and params.prompt_logprobs is None:
        raise UsageError(
            "max_tokens must be an integer of at least 1 or None, got 0: only a request with prompt_logprobs or echo "
            "may generate nothing"
        )
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise UsageError(f"min_tokens ({params.min_tokens}) must not exceed max_tokens ({params.max_tokens})")
    if params.width < params.n:
        raise UsageError(f"best_of ({params.best_of}) must be at least n ({params.n}): the n best of them are returned")
    if params.use_beam_search:
        _check_beams(params)
    else:
        _check_without_beams(params)
    if params.stop and not params.detokenize:
        raise UsageError("stop strings need detokenize=True: without text they cannot be found; use stop_token_ids")


def _check_beams(params: SamplingParams) -> None:
    """Beam search ranks tokens and samples none. The default temperature of 1 changes nothing, so it may stand."""
    for name, off in _SAMPLING_ONLY.items():
        value = getattr(params, name)
        if value not in off:
            raise UsageError(
                f"{name} ({value:g}) and use_beam_search contradict each other, since beam search samples nothing: "
                f"leave {name} out, or use_beam_search"
            )
    if params.width < 2:
        raise UsageError(
            "use_beam_search needs at least 2 beams: set best_of (or n) to their number; for one, which is greedy "
            "decoding, set temperature=0 instead"
        )
    if params.stop:
        raise UsageError(
            "stop strings cannot end a beam, because beams are compared as tokens: use stop_token_ids, or cut the text"
        )


def _check_without_beams(params: SamplingParams) -> None:
    if params.greedy and params.width > 1:
        name = "n" if params.n > 1 else "best_of"
        raise UsageError(
            f"{name} must be 1 when temperature is 0, got {params.width}: greedy decoding gives {params.width} times "
            "the same text; raise the temperature, or set use_beam_search=True"
        )
    if params.early_stopping is not False:
        raise UsageError("early_stopping is for beams: set use_beam_search=True, or leave it out")
    if params.length_penalty != 1.0 and not params.is_ranked:
        raise UsageError(
            "length_penalty ranks answers and none are ranked here: set use_beam_search=True, or best_of greater "
            "than n, or leave it out"
        )


def _shown(value: object) -> str:
    """`value` for an error message: one line, and short whatever a client sent."""
    text = repr(value).replace("\n", " ")
    return text if len(text) <= 60 else text[:57] + "..."


def _integer(name: str, value: object, low: int | None, note: str = "", high: int | None = None) -> int:
    bounds = "" if low is None else f" of at least {low}" if high is None else f" from {low} to {high}"
    valid = isinstance(value, Integral) and not isinstance(value, bool)
    if not valid or (low is not None and value < low) or (high is not None and value > high):  # type: ignore[operator]
        raise UsageError(f"{name} must be an integer{bounds}{note}, got {_shown(value)}")
    return int(value)  # type: ignore[call-overload,no-any-return]


def _optional_integer(name: str, value: object, low: int, high: int | None = None) -> int | None:
    return None if value is None else _integer(name, value, low, " or None", high)


def _number(name: str, value: object, bounds: str, within: Any) -> float:
    valid = isinstance(value, Real) and not isinstance(value, bool)
    if not valid or not math.isfinite(value) or not within(value):  # type: ignore[arg-type]
        raise UsageError(f"{name} must be a number {bounds}, got {_shown(value)}")
    return float(value)  # type: ignore[arg-type]


def _boolean(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"{name} must be True or False, got {_shown(value)}")
    return value


def _early_stopping(value: object) -> bool | Literal["never"]:
    if not isinstance(value, bool) and value != "never":
        raise UsageError(f"early_stopping must be True, False or 'never', got {_shown(value)}")
    return value


def _strings(name: str, value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    given: Iterable[object] = (value,) if isinstance(value, str) else value  # type: ignore[assignment]
    if not isinstance(given, (Sequence, set, frozenset)) or not all(isinstance(text, str) for text in given):
        raise UsageError(f"{name} must be a list of strings, got {_shown(value)}")
    if not all(given):
        raise UsageError(f"{name} must not hold an empty string: it would match everywhere")
    return tuple(given)


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise UsageError(f"{name} must be a list of token ids, got {_shown(value)}")
    return tuple(_integer(f"each id of {name}", token, 0) for token in value)


def _not_empty(name: str, value: tuple[int, ...]) -> tuple[int, ...]:
    if not value:
        raise UsageError(f"{name} must not be empty: no token could be chosen; leave it out to allow all")
    return value


def _logit_bias(value: object) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise UsageError(f"logit_bias must map token ids to numbers, got {_shown(value)}")
    limit = LOGIT_BIAS_LIMIT
    bounds = f"in [-{limit:g}, {limit:g}]"
    return {
        _integer("each id of logit_bias", token, 0): _number(
            f"logit_bias of token {token}", bias, bounds, lambda x: -limit <= x <= limit
        )
        for token, bias in value.items()
    }


def _json_token_id(key: object) -> object:
    return int(key) if isinstance(key, str) and key.isascii() and key.isdigit() else key
