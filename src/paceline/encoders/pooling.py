"""From a transformer's hidden states to one vector a text.

Shapes: B texts of a batch, L tokens of the longest, D hidden size.
"""

from __future__ import annotations

import torch
from torch import nn

from paceline.encoders.modules import DenseModule, Pooling
from paceline.errors import CheckpointError


def pool(hidden_BLD: torch.Tensor, lengths_B: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """The vector of each text, [B, D] float32, whatever stands where its padding is. Padding is on the right."""
    if pooling == "cls":
        return hidden_BLD[:, 0].float()
    if pooling == "last":
        rows_B = torch.arange(len(lengths_B), device=hidden_BLD.device)
        return hidden_BLD[rows_B, lengths_B - 1].float()
    places_L = torch.arange(hidden_BLD.shape[1], device=hidden_BLD.device)
    padding_BL1 = (places_L >= lengths_B[:, None])[..., None]
    if pooling == "max":
        return hidden_BLD.float().masked_fill(padding_BL1, float("-inf")).amax(1)
    return hidden_BLD.float().masked_fill(padding_BL1, 0).sum(1) / lengths_B[:, None]


class Dense(nn.Module):
    """sentence-transformers' Dense: a linear layer over the pooled vector, in float32."""

    def __init__(self, module: DenseModule) -> None:
        """Reads its weights. Raises CheckpointError."""
        super().__init__()
        self.linear = nn.Linear(module.in_features, module.out_features, module.bias)
        self.activation = nn.Tanh() if module.activation == "tanh" else nn.Identity()
        try:
            self.load_state_dict(_read_state(module))
        except RuntimeError as error:  # names and shapes, a line each
            said = " ".join(str(error).split())
            raise CheckpointError(f"{module.directory}: the weights are not config.json's ({said})") from error

    def forward(self, pooled_BD: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.activation(self.linear(pooled_BD))
        return made


def _read_state(module: DenseModule) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file, pickled = module.directory / "model.safetensors", module.directory / "pytorch_model.bin"
    try:
        if file.exists():
            return load_file(file)
        if pickled.exists():
            state: dict[str, torch.Tensor] = torch.load(pickled, map_location="cpu", weights_only=True)
            return state
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{module.directory}: the weights cannot be read ({error}); download it again") from error
    raise CheckpointError(f"{module.directory}: neither {file.name} nor {pickled.name}; download it again")
