"""The exact softmax over the whole vocabulary."""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lvsoftmax.layer import DenseOutputLayer
from lvsoftmax.ops.linear_cross_entropy import BACKENDS


class FullSoftmax(DenseOutputLayer):
    """Exact softmax: ``p(w | h) = exp((w_w . h + b_w) / T) / sum_v exp((w_v . h + b_v) / T)``.

    The row every comparison needs. ``loss`` takes gradients during the forward pass, block by block. With a cap ``c``
    on the logits, ``c tanh(z / c)`` takes the place of ``z = (w_w . h + b_w) / T``. The bias starts at T times the log
    of the words' relative frequency, which a cap squeezes.

    Cost per token: ``6 D V`` FLOPs for a training step, ``2 D V`` for evaluation; memory of one block of logits.

    Reference: Bengio, Ducharme, Vincent & Jauvin 2003, A Neural Probabilistic Language Model, equation 1 (there
    ``y = b + U tanh(...)``, here the backbone supplies ``h``). Temperature and cap are not in the paper;
    the cap is that of Gemma Team 2024, Gemma 2: Improving Open Language Models at a Practical Size, section 2.

    Args:
        hidden_size: D.
        counts: ``[vocab]`` training frequency of each word, non-increasing.
        bias: whether words have a bias ``b``.
        temperature: T > 0.
        learn_temperature: train ``1 / T`` along with the table, starting at ``1 / temperature``.
        softcap: c > 0, in nats; None for no cap.
        backend: what computes loss and gradients; ``auto`` takes the fastest that can run on the device.

    Raises:
        ValueError: ``temperature`` or ``softcap`` is not a positive finite number; ``backend`` cannot run here.
    """

    backends = BACKENDS

    def __init__(
        self,
        hidden_size: int,
        counts: Tensor,
        *,
        bias: bool = True,
        temperature: float = 1.0,
        learn_temperature: bool = False,
        softcap: float | None = None,
        backend: Literal["auto", "eager", "cpp", "triton"] = "auto",
    ) -> None:
        super().__init__(hidden_size, counts, bias=bias, backend=backend)
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"temperature={temperature}: must be a positive finite number")
        if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
            raise ValueError(f"softcap={softcap}: must be a positive finite number, or None for no cap")
        self.softcap = softcap
        if self.bias is not None:
            with torch.no_grad():
                self.bias *= temperature
        inverse_temperature = torch.tensor(1 / temperature)
        if learn_temperature:
            self.inverse_temperature = nn.Parameter(inverse_temperature)
        else:
            self.register_buffer("inverse_temperature", inverse_temperature)

    def operands(self, hidden: Float[Tensor, "tokens hidden"]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Divide the hidden vectors and the bias by the temperature, which divides the logits."""
        bias = None if self.bias is None else self.bias * self.inverse_temperature
        return hidden * self.inverse_temperature, self.weight, bias
