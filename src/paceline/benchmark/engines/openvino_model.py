"""OpenVINO on a CPU, for `paceline optimize --bench`: a model of transformers as its converter takes it from torch."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from paceline.errors import UsageError

# What it calls what is computed in, and what a CPU must be able to do for that.
PRECISIONS = {torch.float32: ("f32", "FP32"), torch.bfloat16: ("bf16", "BF16"), torch.float16: ("f16", "FP16")}


def build(
    model: nn.Module, example: Mapping[str, torch.Tensor], device: torch.device, dtype: torch.dtype
) -> Callable[[Mapping[str, torch.Tensor]], Callable[[], torch.Tensor]]:
    """From inputs to a call that returns the model's first result, in memory that the next call writes to. `model`: in
    float32; `example`: inputs, of which only names, ranks and dtypes count. As many threads as torch has.

    Raises UsageError where OpenVINO is not installed, cannot compute in `dtype` or cannot convert the model.
    """
    try:
        openvino: Any = importlib.import_module("openvino")
    except ImportError as error:
        raise UsageError(f"--against openvino needs it: pip install openvino ({error})") from None
    precision, capability = PRECISIONS[dtype]
    core = openvino.Core()
    if device.type != "cpu":
        raise UsageError(f"--against openvino runs on a CPU, not on {device.type}: add --device cpu")
    if capability not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise UsageError(f"--against openvino: it computes no {precision} on this CPU: try --dtype float32")
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # torch.jit's, of branches that it traces
            converted = openvino.convert_model(model, example_input=dict(example))
    except Exception as error:  # its converter raises what it likes
        said = " ".join(str(error).split())
        raise UsageError(f"--against openvino: it cannot convert {type(model).__name__} ({said[:200]})") from None
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = core.compile_model(converted, "CPU", settings).create_infer_request()

    def prepare(inputs: Mapping[str, torch.Tensor]) -> Callable[[], torch.Tensor]:
        arrays = {name: value.numpy() for name, value in inputs.items()}

        def call() -> torch.Tensor:
            return torch.from_numpy(request.infer(arrays, share_inputs=True, share_outputs=True)[0])

        return call

    return prepare
