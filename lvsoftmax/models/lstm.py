"""The recurrent backbone of word-level language models."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

LSTMState = tuple[Tensor, Tensor]
"""Hidden and cell vectors of every layer, ``[layers, batch, hidden]`` each: what a stretch hands to the next."""


class LSTM(nn.Module):
    """Stacked LSTM (Hochreiter & Schmidhuber 1997) with dropout between layers only (Zaremba et al. 2014, section 3.1).

    Cost per token: ``8 hidden_size (embedding_size + hidden_size)`` FLOPs forward for the first layer,
    ``16 hidden_size^2`` for each further one; three times that for a training step.

    Args:
        hidden_size: D, the width of states and outputs.
        layers: number of stacked layers.
        embedding_size: width of the inputs; None for ``hidden_size``.
        dropout: probability with which an input of a layer above the first is zeroed.
        init_range: weights and biases start uniform in ``+-init_range``; None for ``1/sqrt(hidden_size)``.
        forget_bias: added to the forget gates' bias at the start.

    Raises:
        ValueError: a size is not positive, ``dropout`` is not in [0, 1), or it is above 0 and there is one layer.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        layers: int = 1,
        embedding_size: int | None = None,
        dropout: float = 0.0,
        init_range: float | None = None,
        forget_bias: float = 0.0,
    ) -> None:
        super().__init__()
        self.embedding_size = hidden_size if embedding_size is None else embedding_size
        self.hidden_size = hidden_size
        for name, value in (("hidden_size", hidden_size), ("layers", layers), ("embedding_size", self.embedding_size)):
            if value < 1:
                raise ValueError(f"model.backbone.{name}={value}: must be at least 1")
        if not 0 <= dropout < 1:
            raise ValueError(f"model.backbone.dropout={dropout}: must be in [0, 1)")
        if dropout and layers == 1:
            raise ValueError(
                f"model.backbone.dropout={dropout} with layers=1: there is nothing between layers; set model.dropout, "
                "or layers=2"
            )
        self.lstm = nn.LSTM(self.embedding_size, hidden_size, layers, dropout=dropout, batch_first=True)
        with torch.no_grad():
            for name, parameter in self.lstm.named_parameters():
                if init_range is not None:
                    parameter.uniform_(-init_range, init_range)
                if name.startswith("bias_ih"):
                    parameter[hidden_size : 2 * hidden_size] += forget_bias  # gates are stored in order i, f, g, o

    def forward(
        self, embedded: Float[Tensor, "batch time embedding"], state: LSTMState | None = None
    ) -> tuple[Float[Tensor, "batch time hidden"], LSTMState]:
        """Read a stretch of text from ``state`` on (None: from zeros); return the outputs and the state after it."""
        return self.lstm(embedded, state)
