"""Weights in 8 or 4 bits, for inference: integers with a scale and an offset to each group in a row.

    w ~ scale x q + offset,      q in 0 .. 2^bits - 1

Scale and offset start from the group's extremes; then q is rounded and the line refitted by least squares, in
turn. MOSS was published as int8 and int4 with GPTQ (every matrix but the head, groups of 128), which needs
text to calibrate on; this needs none. Its price in perplexity, and why 4-bit groups are shorter:
docs/generation.md.

Products are computed from weights restored a matrix at a time: this saves memory, not time.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.config import UserError
from model import Transformer

GROUPS = {8: 128, 4: 32}  # bits -> weights that share a scale and an offset
REFITS = 5


class QuantizedLinear(nn.Module):
    """nn.Linear whose weight [out, in] is held as integers: of 8 bits, or of 4, two in a byte."""

    def __init__(self, linear: nn.Linear, bits: int) -> None:
        super().__init__()
        self.bits, self.columns, self.bias = bits, linear.weight.shape[1], linear.bias
        integers, scale, offset = quantize_groups(linear.weight.detach().float(), bits)
        self.register_buffer("integers", integers if bits == 8 else pack(integers))
        self.register_buffer("scale", scale.to(linear.weight.dtype))
        self.register_buffer("offset", offset.to(linear.weight.dtype))

    @property
    def restored(self) -> Tensor:
        """The weight after rounding, [out, in]."""
        integers = self.integers if self.bits == 8 else unpack(self.integers)
        return (integers * self.scale + self.offset).flatten(1)[:, : self.columns]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.restored, self.bias)


def quantize_groups(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """weight [out, in] float32 -> integers [out, groups, size] uint8, scales and offsets [out, groups, 1].

    A short last group is filled up with its row's last weight.
    """
    size, top = GROUPS[bits], 2**bits - 1
    padded = F.pad(weight, (0, -weight.shape[1] % size), mode="replicate").unflatten(1, (-1, size))
    tiny = torch.finfo(torch.float32).tiny
    offset = padded.amin(-1, keepdim=True)
    scale = ((padded.amax(-1, keepdim=True) - offset) / top).clamp_min(tiny)
    centred = padded - padded.mean(-1, keepdim=True)
    for _ in range(REFITS):
        integers = ((padded - offset) / scale).round().clamp(0, top)
        spread = integers - integers.mean(-1, keepdim=True)
        slope = (spread * centred).sum(-1, keepdim=True) / spread.square().sum(-1, keepdim=True).clamp_min(
            tiny
        )
        scale = slope.clamp_min(tiny)
        offset = padded.mean(-1, keepdim=True) - scale * integers.mean(-1, keepdim=True)
    return ((padded - offset) / scale).round().clamp(0, top).to(torch.uint8), scale, offset


def pack(integers: Tensor) -> Tensor:
    """uint8 values in 0..15, [.., 2 n] -> [.., n]: the first half of a group in the low four bits."""
    low, high = integers.chunk(2, dim=-1)
    return low | high << 4


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`."""
    return torch.cat((packed & 15, packed >> 4), dim=-1)


@torch.no_grad()
def quantize(model: Transformer, bits: int) -> Transformer:
    """Replace every matrix of the layers by its rounded form, in place; embedding, head and norms stay.

    The model can then generate, but neither be trained nor saved.
    """
    if bits not in GROUPS:
        raise UserError(f"weights can be held in 4 or 8 bits, not {bits}")
    for layer in model.layers:
        for parent in (layer.attention, layer.mlp):
            for name, child in list(parent.named_children()):
                setattr(parent, name, QuantizedLinear(child, bits))
    return model
