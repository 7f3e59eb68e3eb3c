"""The attention backbone of word-level language models.

Letters: B streams, T positions of this stretch, M remembered positions, H heads, E width of a head, D hidden.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

TransformerState = tuple[tuple[Tensor, Tensor], ...]
"""Keys and values of the last positions that were read, one ``[B, H, M, E]`` pair per layer."""


class Transformer(nn.Module):
    """Decoder-only Transformer: pre-norm blocks, rotary positions, causal attention as far back as a memory reaches.

    Each block computes ``x + attention(norm(x))`` and then ``x + mlp(norm(x))`` (Vaswani et al. 2017 with the norm
    moved in front, Xiong et al. 2020), queries and keys are rotated by their distance (Su et al. 2021, equation 34),
    and keys and values of earlier stretches are attended to without gradient (Dai et al. 2019, section 3.2, with
    rotary instead of their relative positions).

    A position attends to itself and to the M before it, in whichever stretch they were read: the outputs do not depend
    on where a text is cut, and no distance is evaluated that was never trained. Without a memory, M = 0, it attends to
    its own stretch from the start on.

    Cost per token and layer: ``24 D^2 + 4 D (M + T)`` FLOPs forward, pairs out of sight included; three times that for
    a training step.

    Args:
        hidden_size: D.
        layers: number of blocks.
        heads: number of attention heads; ``hidden_size / heads`` must be even.
        memory: M, how many positions before its own each attends to; 0: those of its stretch.
        dropout: probability with which a branch's output is zeroed.

    Raises:
        ValueError: sizes do not fit together, or ``dropout`` is not in [0, 1).
    """

    def __init__(
        self, *, hidden_size: int, layers: int = 2, heads: int = 4, memory: int = 0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if layers < 1 or heads < 1 or hidden_size < 1:
            raise ValueError(f"model.backbone: hidden_size={hidden_size}, layers={layers}, heads={heads} must be >= 1")
        if hidden_size % (2 * heads):
            raise ValueError(
                f"model.backbone.hidden_size={hidden_size} must be a multiple of 2 * heads = {2 * heads}: rotary "
                "positions turn pairs of a head's dimensions"
            )
        if memory < 0:
            raise ValueError(f"model.backbone.memory={memory}: must not be negative")
        if not 0 <= dropout < 1:
            raise ValueError(f"model.backbone.dropout={dropout}: must be in [0, 1)")
        self.embedding_size = self.hidden_size = hidden_size
        self.memory = memory
        self.blocks = nn.ModuleList(_Block(hidden_size, heads, memory, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden_size)
        for name, parameter in self.named_parameters():
            if name.endswith("weight") and parameter.ndim == 2:
                # What writes to the residual stream starts smaller, so that its variance does not grow with depth.
                residual = name.endswith(("mix.weight", "contract.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if residual else 0.02)

    def forward(
        self, embedded: Float[Tensor, "batch time hidden"], state: TransformerState | None = None
    ) -> tuple[Float[Tensor, "batch time hidden"], TransformerState]:
        """Read a stretch of text after ``state`` (None: nothing before); return the outputs and the new memory."""
        remembered = (None,) * len(self.blocks) if state is None else state
        x, memory = embedded, []
        for block, past in zip(self.blocks, remembered, strict=True):
            x, (key, value) = block(x, past)
            first = max(key.shape[2] - self.memory, 0)
            memory.append((key[:, :, first:], value[:, :, first:]))
        return self.norm(x), tuple(memory)


class _Block(nn.Module):
    def __init__(self, hidden_size: int, heads: int, memory: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.memory = memory
        self.dropout = nn.Dropout(dropout)
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.query_key_value = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.mix = nn.Linear(hidden_size, hidden_size, bias=False)
        self.mlp_norm = nn.LayerNorm(hidden_size)
        self.expand = nn.Linear(hidden_size, 4 * hidden_size)
        self.contract = nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        batch, time, _ = x.shape
        projected = self.query_key_value(self.attention_norm(x))
        query, key, value = projected.view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        seen = key.shape[2]
        visible = torch.ones(time, seen, dtype=torch.bool, device=x.device).tril(seen - time)
        if self.memory:
            visible = visible.triu(seen - time - self.memory)
        mixed = F.scaled_dot_product_attention(_rotate(query, seen - time), _rotate(key, 0), value, attn_mask=visible)
        x = x + self.dropout(self.mix(mixed.transpose(1, 2).reshape(batch, time, -1)))
        x = x + self.dropout(self.contract(F.gelu(self.expand(self.mlp_norm(x)))))
        return x, (key, value)


def _rotate(x_BHTE: Tensor, first: int) -> Tensor:
    """Turn each pair of dimensions by an angle proportional to the position, counted from ``first``."""
    time, width = x_BHTE.shape[-2:]
    frequency = 10000 ** (-torch.arange(0, width, 2, device=x_BHTE.device, dtype=torch.float32) / width)
    angle = torch.arange(first, first + time, device=x_BHTE.device, dtype=torch.float32)[:, None] * frequency
    cos, sin = angle.cos().to(x_BHTE.dtype), angle.sin().to(x_BHTE.dtype)
    even, odd = x_BHTE.chunk(2, -1)
    return torch.cat([even * cos - odd * sin, even * sin + odd * cos], -1)
