"""The exact softmax over the whole vocabulary."""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lvsoftmax.layer import DenseOutputLayer


class FullSoftmax(DenseOutputLayer):
    """Exact softmax: ``p(w | h) = exp((w_w . h + b_w) / T) / sum_v exp((w_v . h + b_v) / T)``.

    The row every comparison needs. ``loss`` takes gradients during the forward pass, chunk by chunk.

    Cost per token: ``6 D V`` FLOPs for a training step, ``2 D V`` for evaluation; memory of one chunk of logits.

    Reference: Bengio, Ducharme, Vincent & Jauvin 2003, A Neural Probabilistic Language Model, equation 1 (there
    ``y = b + U tanh(...)``, here the backbone supplies ``h``). The temperature is not in the paper.

    Args:
        hidden_size: D.
        counts: ``[vocab]`` training frequency of each word, non-increasing.
        bias: whether words have a bias ``b``.
        temperature: T > 0.
        learn_temperature: train ``1 / T`` along with the table, starting at ``1 / temperature``.
        backend: what computes loss and gradients; ``auto`` takes the fastest that can run on the device.

    Raises:
        ValueError: ``temperature`` is not a positive finite number; ``backend`` cannot run here.
    """

    def __init__(
        self,
        hidden_size: int,
        counts: Tensor,
        *,
        bias: bool = True,
        temperature: float = 1.0,
        learn_temperature: bool = False,
        backend: Literal["auto", "eager"] = "auto",
    ) -> None:
        super().__init__(hidden_size, counts, bias=bias, backend=backend)
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"temperature={temperature}: must be a positive finite number")
        inverse_temperature = torch.tensor(1 / temperature)
        if learn_temperature:
            self.inverse_temperature = nn.Parameter(inverse_temperature)
        else:
            self.register_buffer("inverse_temperature", inverse_temperature)

    def operands(self, hidden: Float[Tensor, "tokens hidden"]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Divide the hidden vectors and the bias by the temperature, which divides the logits."""
        bias = None if self.bias is None else self.bias * self.inverse_temperature
        return hidden * self.inverse_temperature, self.weight, bias
