"""Weights in 8 or 4 bits, for inference: rounded to integers with a scale to each group of 128 in a row.

    w ~ scale x q,      scale = max|w| / (2^(bits - 1) - 1) over the group

MOSS was published in such formats (int8 and int4, groups of 128, every matrix but the head; GPTQ chose the
rounding, here it is to nearest). Memory is a quarter or an eighth of float32. Products are computed in the
activations' dtype from weights restored a matrix at a time, so on a CPU this saves memory, not time.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.config import UserError
from model import Transformer

GROUP = 128


class QuantizedLinear(nn.Module):
    """nn.Linear whose weight [out, in] is held as integers: int8 as they are, int4 two in a byte."""

    def __init__(self, linear: nn.Linear, bits: int) -> None:
        super().__init__()
        self.bits, (self.rows, self.columns) = bits, linear.weight.shape
        quantized, scale = quantize_groups(linear.weight.detach().float(), bits)
        self.register_buffer("quantized", quantized if bits == 8 else pack(quantized))
        self.register_buffer("scale", scale.to(linear.weight.dtype))
        self.bias = linear.bias

    @property
    def restored(self) -> Tensor:
        """The weight, rounded, [out, in]."""
        whole = self.quantized if self.bits == 8 else unpack(self.quantized)
        return (whole.to(self.scale.dtype) * self.scale).flatten(1)[:, : self.columns]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.restored, self.bias)


def quantize_groups(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """weight [out, in] -> integers [out, groups, 128] int8 and scales [out, groups, 1]; a short last group is
    padded."""
    padded = F.pad(weight, (0, -weight.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    largest = 2 ** (bits - 1) - 1
    scale = padded.abs().amax(-1, keepdim=True) / largest
    quantized = (padded / scale.clamp_min(torch.finfo(torch.float32).tiny)).round()
    return quantized.to(torch.int8), scale


def pack(quantized: Tensor) -> Tensor:
    """int8 values in -8..7, [.., 128] -> uint8 [.., 64]: the first half of a group in the low four bits."""
    low, high = (quantized + 8).to(torch.uint8).chunk(2, dim=-1)
    return low | high << 4


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`."""
    return torch.cat((packed & 15, packed >> 4), dim=-1).to(torch.int8) - 8


@torch.no_grad()
def quantize(model: Transformer, bits: int) -> Transformer:
    """Replace every matrix of the layers by its rounded form, in place; embedding, head and norms stay.

    The model can then generate but neither be trained nor saved.
    """
    if bits not in (4, 8):
        raise UserError(f"weights can be held in 4 or 8 bits, not {bits}")
    for layer in model.layers:
        for parent in (layer.attention, layer.mlp):
            for name, child in list(parent.named_children()):
                setattr(parent, name, QuantizedLinear(child, bits))
    return model
