"""Attention, decoding and losses: hand-written Triton beside plain-PyTorch references.

`attention` and `make_bounds` are all that a model needs, `decode_attention` serves generation. Triton is
imported when a Triton path is first chosen, so this package also loads where there is none (and where another
library only asks whether a `kernels` package exists).
"""

from kernels.attention import Bounds, attention, decode_attention, make_bounds

__all__ = ["Bounds", "attention", "decode_attention", "make_bounds"]
