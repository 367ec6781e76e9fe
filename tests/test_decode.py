"""Decoding: one query a sequence over its cache, against full attention and against float64."""

import pytest
import torch
from kernel_cases import DEVICE, error, only_interpreted, runs_kernels
from torch import Tensor

from kernels import attention, decode_attention


def cache_like(
    B: int, heads: tuple[int, int], S: int, D: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """A query for each sequence, and keys and values as `generate` keeps them: views of one [B, 2 KV, S,
    D]."""
    H, KV = heads
    generator = torch.Generator().manual_seed(S + D)
    q = torch.randn(B, H, D, generator=generator).to(DEVICE, dtype)
    cache = torch.randn(B, 2 * KV, S, D, generator=generator).to(DEVICE, dtype)
    return q, cache[:, :KV], cache[:, KV:]


def spoil_unfilled(keys: Tensor, values: Tensor, lengths: Tensor) -> None:
    """Fill with NaN the places that no sequence has written: reading one would show."""
    empty = torch.arange(keys.shape[2], device=keys.device) >= lengths[:, None]
    for part in (keys, values):
        part.masked_fill_(empty[:, None, :, None], torch.nan)


def test_sdpa_decoding_is_the_last_row_of_attention() -> None:
    q, keys, values = cache_like(2, (4, 2), 33, 16, torch.float32)
    lengths = torch.tensor([33, 7], dtype=torch.int32)
    out = decode_attention(q, keys, values, lengths, impl="sdpa")
    for b, length in enumerate(lengths.tolist()):
        k, v = (x[b : b + 1, :, :length].transpose(1, 2) for x in (keys, values))
        whole = attention(q[b : b + 1, None], k, v, impl="reference")
        torch.testing.assert_close(out[b], whole[0, 0])


CASES = [  # lengths of the sequences, places in the cache, heads, D, precision
    ([1, 2, 255], 256, (4, 2), 64, torch.float32),
    ([256, 257, 31], 300, (2, 2), 128, torch.bfloat16),
    ([1000, 0], 1024, (8, 1), 16, torch.float32),
    ([65, 513, 700], 700, (6, 2), 72, torch.float16),
    ([4096], 4096, (4, 1), 128, torch.bfloat16),
    ([33], 64, (32, 8), 80, torch.float32),
]


@runs_kernels
@pytest.mark.parametrize("lengths, S, heads, D, dtype", CASES)
def test_kernel_decodes_as_exactly_as_pytorch(
    lengths: list[int], S: int, heads: tuple[int, int], D: int, dtype: torch.dtype
) -> None:
    """Ragged batches; the error against float64 at most twice PyTorch's in the same precision."""
    q, keys, values = cache_like(len(lengths), heads, S, D, dtype)
    filled = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    plain = decode_attention(q, keys, values, filled, impl="sdpa")
    exact = decode_attention(q.double(), keys.double(), values.double(), filled, impl="sdpa")
    spoil_unfilled(keys, values, filled)
    ours = decode_attention(q, keys, values, filled, impl="triton")
    rounding = torch.finfo(dtype).eps * exact.abs().max().item()
    assert error(ours, exact) <= max(2 * error(plain, exact), rounding)
    assert torch.equal(ours, decode_attention(q, keys, values, filled, impl="triton"))
    assert not ours[filled == 0].any()


@runs_kernels
@pytest.mark.parametrize("length", [1, 5, 8, 9, 20, 1000])
def test_kernel_reads_a_rolling_buffer(length: int) -> None:
    """A window of 8 kept in 8 places, position p at p % 8, is windowed attention at any length."""
    W, D = 8, 16
    generator = torch.Generator().manual_seed(length)
    q = torch.randn(1, 1, 2, D, generator=generator).to(DEVICE)
    k, v = (torch.randn(1, length, 1, D, generator=generator).to(DEVICE) for _ in range(2))
    buffer = torch.full((2, 1, 1, W, D), torch.nan, device=DEVICE)
    for position in range(length):
        buffer[0, 0, 0, position % W], buffer[1, 0, 0, position % W] = k[0, position, 0], v[0, position, 0]
    filled = torch.tensor([min(length, W)], dtype=torch.int32, device=DEVICE)
    got = decode_attention(q[:, 0], buffer[0], buffer[1], filled, impl="triton")
    expected = attention(q, k[:, -W:], v[:, -W:], impl="reference")[:, 0]
    torch.testing.assert_close(got, expected)


@runs_kernels
def test_kernel_decoding_passes_opcheck() -> None:
    from kernels.decode import flash_decode

    q, keys, values = cache_like(2, (4, 2), 40, 16, torch.float32)
    lengths = torch.tensor([40, 7], dtype=torch.int32, device=DEVICE)
    torch.library.opcheck(flash_decode, (q, keys, values, lengths, 0.25))


@only_interpreted
def test_kernel_decoding_stays_inside_its_tensors() -> None:
    import interpreter

    q, keys, values = cache_like(2, (6, 2), 600, 24, torch.float32)
    lengths = torch.tensor([599, 3], dtype=torch.int32)
    with interpreter.watched() as faults:
        decode_attention(q, keys, values, lengths, impl="triton")
    assert not faults, faults[:5]


@pytest.mark.slow
@runs_kernels
def test_kernel_decodes_every_length() -> None:
    q, keys, values = cache_like(1, (2, 1), 4096, 16, torch.float32)
    for length in (*range(1, 70), *range(70, 4096, 61), 4095, 4096):
        filled = torch.tensor([length], dtype=torch.int32, device=DEVICE)
        expected = decode_attention(q.double(), keys.double(), values.double(), filled, impl="sdpa")
        assert error(decode_attention(q, keys, values, filled, impl="triton"), expected) <= 2e-6, length
