"""`model.generate` of transformers with our loop behind the same call.

transformers prepares a call as ever: its config, the encoder's outputs, the processors of scores. Then our loop runs
over static keys and values (decoder.py), greedy and sampling (sampling.py) or beams (beams.py). A call that asks for
what the loop does not do goes to transformers' own, with one warning and the reason (request.py).
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
from typing import Any

import torch

from paceline.fusion.cuda_graphs import CudaRecorder, Function, GraphPool
from paceline.fusion.generate.beam_step import advance
from paceline.fusion.generate.beams import beam_search
from paceline.fusion.generate.cache import Pool
from paceline.fusion.generate.decoder import Decoder
from paceline.fusion.generate.processors import prepared
from paceline.fusion.generate.request import Request, refused, refused_arguments, refused_mode, request_of
from paceline.fusion.generate.sampling import sample
from paceline.fusion.generate.step import captures
from paceline.fusion.generate.transformers_names import output_class, own_loop

__all__ = ["Generate"]


class OtherModeError(Exception):
    """A kind of generation that is not ours, found when the call had been prepared."""


class Generate:
    """What `model.generate` becomes, on the instance alone. `forward`: what the model's forward has become; its report
    is told why a call went to transformers' own loop. A copy or a pickle of the model brings it along."""

    def __init__(self, model: Any, forward: Any) -> None:
        self.forward = forward
        self._model = model
        self._pool = Pool()
        self.beam_steps: dict[torch.device, GraphPool] = {}
        self.original = types.MethodType(type(model).generate, model)
        functools.update_wrapper(self, self.original)  # libraries look at its signature

    def __deepcopy__(self, memo: dict[int, Any]) -> Generate:
        return Generate(copy.deepcopy(self._model, memo), copy.deepcopy(self.forward, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return Generate, (self._model, self.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(self.original).bind(*args, **kwargs).arguments
        reason = refused_arguments(self._model, {**given.pop("kwargs", {}), **given})
        if reason is None:
            try:
                return self.original(*args, **kwargs, custom_generate=self._prepared)
            except OtherModeError as error:
                reason = str(error)
        self.forward.report.leave(reason)
        return self.original(*args, **kwargs)

    def _prepared(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **inputs: Any,
    ) -> Any:
        """What transformers' `generate` calls when it has prepared a call."""
        mode = refused_mode(generation_config)
        if mode is not None:
            raise OtherModeError(mode)
        reason = refused(generation_config, model, stopping_criteria, inputs, input_ids.device)
        if reason is not None:
            self.forward.report.leave(reason)
            own = own_loop(model, beams=(generation_config.num_beams or 1) > 1)
            return own(
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                **{name: value for name, value in inputs.items() if name not in ("synced_gpus", "streamer")},
            )
        return self._run(input_ids, logits_processor, request_of(generation_config, inputs, input_ids.device))

    def _run(self, input_ids: torch.Tensor, logits_processor: Any, request: Request) -> Any:
        decoder = Decoder(self._model, request, self._pool, input_ids.shape[0], fixed=captures(self._model))
        vocab_size = self._model.get_output_embeddings().weight.shape[0]
        processors = prepared(logits_processor, vocab_size, input_ids.device)
        try:
            if request.beams > 1:
                step = self._beam_step(input_ids.device, request)
                result = beam_search(decoder, request, processors, input_ids, step)
            else:
                result = sample(decoder, request, processors, input_ids)
            if not request.as_dict:
                return result["sequences"]
            kind = output_class(decoder.encoder_decoder, beams=request.beams > 1)
            return kind(**result, past_key_values=decoder.past_key_values())
        finally:
            decoder.close()
            if not decoder.agreed:
                self.forward.report.note("generate: steps are the model's own: faster ones gave another result")

    def _beam_step(self, device: torch.device, request: Request) -> Function:
        """On a GPU in CUDA graphs: kernel by kernel it takes a host as long as T5-base's forward takes an H100. But not
        of a search that draws, whose numbers are then torch's own."""
        if device.type != "cuda" or request.sample:
            return advance
        return self.beam_steps.setdefault(device, GraphPool(advance, CudaRecorder(device)))
