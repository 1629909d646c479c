"""The model's own decoder, a prompt and then a token at a time, over a cache whose buffers stay (cache.py).

Shapes: R rows (batch x beams), B sentences, P prompt, L capacity, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from paceline.fusion.capture import TOLERANCE
from paceline.fusion.generate.cache import Pool
from paceline.fusion.generate.request import Request
from paceline.fusion.generate.shared_keys import SharedKeys
from paceline.fusion.generate.step import FixedStep
from paceline.fusion.generate.transformers_names import OLD_POSITIONS, attention_of


class Decoder:
    """One generation's decoder. The inputs that `generate` has prepared have R rows, of which those of a sentence
    follow each other and are alike.

    `agreed`: false where a step over fixed buffers or shared keys was tried and is not what the model computes; the
    model's plain steps run then, from now on.
    """

    def __init__(self, model: Any, request: Request, pool: Pool, rows: int, fixed: bool) -> None:
        self.model, self.request, self.pool = model, request, pool
        self.encoder_decoder = bool(model.config.is_encoder_decoder)
        self.inputs = dict(request.inputs)
        self.position_ids_RP = self.inputs.pop("position_ids", None)
        self.mask_RL = None if self.encoder_decoder else _grown(self.inputs.pop("attention_mask", None), request)
        self.agreed = True
        self.shares_keys = request.group > 1 and self.encoder_decoder and attention_of(model) == "sdpa"
        self._take(rows, fixed)

    def _take(self, rows: int, fixed: bool) -> None:
        self.shares_keys = self.shares_keys and not self.pool.plain
        fixed, beams = fixed and not self.pool.plain, self.request.beams > 1
        self.cache = self.pool.take(rows, self.request.max_length, self.model.device, fixed, beams)

    def prefill(self, tokens_RP: torch.Tensor) -> torch.Tensor:
        """Logits of the token after the prompt, float32 [R, V]. Rows of a sentence are computed once."""
        group, prompt = self.request.group, tokens_RP.shape[1]
        inputs = {name: _of_sentences(value, group) for name, value in self.inputs.items()}
        if self.mask_RL is not None:
            inputs["attention_mask"] = self.mask_RL[::group, :prompt]
        if self.position_ids_RP is not None:
            inputs["position_ids"] = self.position_ids_RP[::group]
        if OLD_POSITIONS:
            inputs["cache_position"] = torch.arange(prompt, device=tokens_RP.device)
        logits_BV = self._forward(_of_sentences(tokens_RP, group), inputs, self.request.cache)
        self._load(prompt)
        if not self._begin(prompt, logits_BV.argmax(dim=-1)):
            self.agreed, self.pool.plain = False, True
            self._take(tokens_RP.shape[0], fixed=False)
            self._load(prompt)
        return logits_BV.repeat_interleave(group, dim=0) if group > 1 else logits_BV

    def _load(self, prompt: int) -> None:
        masked = self.model.main_input_name == "input_ids"  # Whisper's decoder, for one, takes no mask of sound
        self.cache.load(self.request.cache, prompt, shared=self.shares_keys, masked=masked)

    def _begin(self, prompt: int, tokens_B: torch.Tensor) -> bool:
        """Prepares what steps need besides the cache. False where a kind of step that is tried for the first time
        computes something else than the model does."""
        new = self.shares_keys and not self.pool.shared_before
        if self.cache.positions.fixed:
            key = FixedStep.key(self.model, self.cache, self.position_ids_RP)
            if self.cache.step is None or self.cache.step[0] != key:
                new = True
                self.cache.step = (key, self._fixed_step())
            self._begin_fixed(prompt)
        if new:
            if not self._agrees(tokens_B):
                return False
            self.pool.shared_before = self.pool.shared_before or self.shares_keys
            if self.cache.positions.fixed:
                self._begin_fixed(prompt)
        return True

    def _fixed_step(self) -> FixedStep:
        rest = {name: value for name, value in self.inputs.items() if name != "attention_mask"}
        mask = "decoder_attention_mask" if self.encoder_decoder else "attention_mask"
        return FixedStep(self.model, self.cache, rest, {"tokens": self._tokens_name(), "mask": mask})

    def _begin_fixed(self, prompt: int) -> None:
        self.cache.step[1].begin(
            None if self.mask_RL is None else self.mask_RL[:, :prompt],
            self.inputs.get("attention_mask") if self.encoder_decoder else None,
            None if self.position_ids_RP is None else self.position_ids_RP[:, -1:],
        )

    def _agrees(self, tokens_B: torch.Tensor) -> bool:
        """Whether a step computes what the model computes with a cache of transformers, for one token a sentence: a
        model may take masks, positions or shared keys in a way of its own. The next step overwrites what this one
        wrote."""
        group = self.request.group
        inputs = {name: _of_sentences(value, group) for name, value in self._inputs_of_step().items()}
        expected_BV = self._forward(tokens_B[:, None], inputs, self.request.cache, _own_code(self.model))
        try:
            got_BV = self._logits(tokens_B.repeat_interleave(group))[::group]
        except RuntimeError:
            return False
        error = (got_BV - expected_BV).square().mean().sqrt() / expected_BV.square().mean().sqrt()
        return float(error) < TOLERANCE[self.cache.own[0].keys.dtype]

    def step(self, tokens_R: torch.Tensor) -> torch.Tensor:
        """Logits of the token after `tokens`, which follow what each row has, float32 [R, V]."""
        logits_RV = self._logits(tokens_R)
        self.cache.positions.advance()
        return logits_RV

    def _logits(self, tokens_R: torch.Tensor) -> torch.Tensor:
        with SharedKeys() if self.shares_keys else nullcontext():
            if self.cache.positions.fixed:
                return self.cache.step[1](tokens_R)  # type: ignore[no-any-return]
            return self._forward(tokens_R[:, None], self._inputs_of_step(), self.cache.of_model)

    def _inputs_of_step(self) -> dict[str, Any]:
        past, inputs = self.cache.positions.past, dict(self.inputs)
        if self.mask_RL is not None:
            inputs["attention_mask"] = self.mask_RL[:, : past + 1]
        if self.position_ids_RP is not None:
            inputs["position_ids"] = self.position_ids_RP[:, -1:] + past + 1 - self.position_ids_RP.shape[1]
        if OLD_POSITIONS:
            inputs["cache_position"] = torch.full((1,), past, device=self.model.device)
        return inputs

    def _forward(
        self, tokens: torch.Tensor, inputs: dict[str, Any], cache: Any, model: Callable[..., Any] | None = None
    ) -> torch.Tensor:
        inputs[self._tokens_name()] = tokens
        outputs = (model or self.model)(**inputs, past_key_values=cache, use_cache=True, return_dict=True)
        return outputs.logits[:, -1].to(torch.float32, copy=True)  # type: ignore[no-any-return]

    def _tokens_name(self) -> str:
        return "decoder_input_ids" if self.encoder_decoder else "input_ids"

    def follow(self, parents_R: torch.Tensor) -> None:
        """Row r continues what row parents[r] was, a row of the same sentence."""
        self.cache.positions.follow(parents_R)

    def past_key_values(self) -> Any:
        return self.cache.exported()

    def close(self) -> None:
        """Gives the cache back. Nothing that was returned lies in it."""
        self.pool.give(self.cache)


def _own_code(model: Any) -> Callable[..., Any]:
    """The model without captured graphs: one call does not pay for a capture, which takes seconds."""
    hooked = model._forward_hooks or model._forward_pre_hooks
    own: Callable[..., Any] = model if hooked else getattr(vars(model).get("forward"), "uncaptured", model)
    return own


def _grown(mask_RP: torch.Tensor | None, request: Request) -> torch.Tensor | None:
    """A decoder's mask with ones for what will be generated."""
    if mask_RP is None:
        return None
    mask_RL: torch.Tensor = mask_RP.new_ones(mask_RP.shape[0], request.max_length)
    mask_RL[:, : mask_RP.shape[1]] = mask_RP
    return mask_RL


def _of_sentences(value: Any, group: int) -> Any:
    """The first row of each sentence, in the form that a call without beams gives it: no other capture is needed."""
    if group == 1:
        return value
    if isinstance(value, torch.Tensor):
        return value[::group].contiguous()
    if hasattr(value, "last_hidden_state"):
        return type(value)(last_hidden_state=value.last_hidden_state[::group].contiguous())
    return value
