"""The model: one decoder for both published systems.

Moxin-7B (arXiv 2412.06845, section 3) is a Mistral-type decoder: RMSNorm before each sub-layer, grouped-query
attention with rotary positions and an optional sliding window, SwiGLU, no biases. MOSS-16B (DOI
10.1007/s11633-024-1502-8) is a CodeGen-type decoder: one LayerNorm feeds attention and MLP side by side, GELU,
rotary positions on the first 64 of 256 dimensions. The switches between them are fields of `Config`.

Shapes: B sequences, T tokens, H query heads, KV key/value heads, D head dimension, V vocabulary.
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from kernels import attention, make_bounds
from kernels.loss import linear_cross_entropy, linear_logprobs


@dataclass(frozen=True)
class Config:
    """Shape of a decoder. Raises ValueError for shapes that do not divide."""

    architecture: Literal["mistral", "llama", "codegen"] = "mistral"  # the Hugging Face family it is saved as
    vocab_size: int = 4096
    layers: int = 4
    dim: int = 256
    heads: int = 4
    kv_heads: int = 2  # heads % kv_heads == 0; fewer than heads = grouped-query attention
    head_dim: int = 64
    ffn_dim: int = 704
    max_seq_len: int = 2048
    sliding_window: int = 0  # keys a query sees, itself included; 0 = all
    rope_theta: float = 10_000.0
    rotary_dim: int = 0  # leading dimensions of a head that rotate; 0 = all
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    parallel_block: bool = False  # x + attention(norm(x)) + mlp(norm(x)), one norm (GPT-J, CodeGen)
    mlp: Literal["swiglu", "gelu"] = "swiglu"  # gelu = up, tanh-GELU, down, with biases
    head_bias: bool = False
    tied: bool = False  # output matrix = embedding matrix
    init_std: float = 0.02

    def __post_init__(self) -> None:
        for name in ("vocab_size", "layers", "dim", "heads", "kv_heads", "head_dim", "ffn_dim", "max_seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.rotary % 2 or self.rotary > self.head_dim:
            raise ValueError(f"rotary_dim ({self.rotary}) must be even and at most head_dim ({self.head_dim})")

    @property
    def rotary(self) -> int:
        return self.rotary_dim or self.head_dim


PRESETS: dict[str, Config] = {
    "tiny": Config(max_seq_len=1024),
    "small": Config(
        vocab_size=32_000, layers=12, dim=768, heads=12, kv_heads=4, ffn_dim=2048, max_seq_len=4096
    ),  # 113 M parameters
    # arXiv 2412.06845, table 1 and the released config.json: Mistral-7B widened to 36 layers. 8,114,180,096.
    "moxin-7b": Config(
        vocab_size=32_000,
        layers=36,
        dim=4096,
        heads=32,
        kv_heads=8,
        head_dim=128,
        ffn_dim=14_336,
        max_seq_len=32_768,
        sliding_window=4096,
    ),
    # config.json of the released moss-moon-003 checkpoints. 16,717,980,160 parameters.
    "moss-16b": Config(
        architecture="codegen",
        vocab_size=107_008,
        layers=34,
        dim=6144,
        heads=24,
        kv_heads=24,
        head_dim=256,
        ffn_dim=24_576,
        max_seq_len=2048,
        rotary_dim=64,
        norm="layer",
        parallel_block=True,
        mlp="gelu",
        head_bias=True,
    ),
}


def make_norm(config: Config) -> nn.Module:
    kind = nn.RMSNorm if config.norm == "rms" else nn.LayerNorm
    return kind(config.dim, eps=config.norm_eps)


def rotary_tables(positions: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """cos and sin of position x frequency (Su et al. 2021, eq. 15): positions [T] or [B, T] -> 2 x [.., T, 1, R/2]."""
    exponents = torch.arange(0, config.rotary, 2, device=positions.device, dtype=torch.float32) / config.rotary
    angles = positions[..., None].float() * config.rope_theta**-exponents
    return angles.cos().unsqueeze(-2), angles.sin().unsqueeze(-2)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each pair (i, i + R/2) of the first R dimensions by its angle; x [B, T, heads, D], computed in float32."""
    cos, sin = rope
    half = cos.shape[-1]
    a, b, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions (Ainslie et al. 2023)."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q = nn.Linear(config.dim, queries, bias=False)
        self.k = nn.Linear(config.dim, keys, bias=False)
        self.v = nn.Linear(config.dim, keys, bias=False)
        self.o = nn.Linear(queries, config.dim, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], bounds: Any, cache: Any = None) -> Tensor:
        q = self.q(x).unflatten(-1, (self.config.heads, -1))  # [B, T, H, D]
        k = self.k(x).unflatten(-1, (self.config.kv_heads, -1))  # [B, T, KV, D]
        v = self.v(x).unflatten(-1, (self.config.kv_heads, -1))
        q, k = rotate(q, rope), rotate(k, rope)
        out = attention(q, k, v, bounds=bounds) if cache is None else cache.attend(self.layer, q, k, v)
        return self.o(out.flatten(-2))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, eq. 6)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.up = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.down = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class MLP(nn.Module):
    """down(gelu(up(x))), tanh approximation, with biases (CodeGen)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.up = nn.Linear(config.dim, config.ffn_dim)
        self.down = nn.Linear(config.ffn_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Layer(nn.Module):
    """One decoder layer. `recompute`, where set, runs the body under activation checkpointing."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, layer)
        self.mlp_norm = None if config.parallel_block else make_norm(config)
        self.mlp = SwiGLU(config) if config.mlp == "swiglu" else MLP(config)
        self.recompute: Callable[..., Tensor] | None = None

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], bounds: Any = None, cache: Any = None) -> Tensor:
        if self.recompute is not None and torch.is_grad_enabled():
            return self.recompute(self.body, x, rope, bounds, cache)
        return self.body(x, rope, bounds, cache)

    def body(self, x: Tensor, rope: tuple[Tensor, Tensor], bounds: Any, cache: Any) -> Tensor:
        normed = self.attention_norm(x)
        attended = x + self.attention(normed, rope, bounds, cache)
        return attended + self.mlp(normed if self.mlp_norm is None else self.mlp_norm(attended))


class Transformer(nn.Module):
    """Decoder-only language model: tokens [B, T] int64 -> logits [B, T, V].

    Build under `torch.device("meta")` to get shapes without memory; otherwise weights are initialised from `seed`.
    """

    def __init__(self, config: Config, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.layers))
        self.norm = make_norm(config)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=config.head_bias)
        if config.tied:
            self.head.weight = self.embed.weight
        if not self.embed.weight.is_meta:
            self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Matrices N(0, init_std), those that write to the residual stream N(0, init_std / sqrt(2 layers)) (GPT-2,
        section 2.3); norms 1; biases 0. Each tensor has its own generator, seeded by its name, so the values do
        not depend on how many processes share the model or on which layers exist beside it."""
        for name, parameter in self.named_parameters():
            value = torch.zeros(parameter.shape) if name.endswith("bias") else torch.ones(parameter.shape)
            if parameter.ndim > 1:
                residual = name.endswith(("attention.o.weight", "mlp.down.weight"))
                std = self.config.init_std / (math.sqrt(2 * self.config.layers) if residual else 1)
                generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
                value.normal_(0, std, generator=generator)
            if isinstance(parameter, DTensor):
                mesh, placements = parameter.device_mesh, parameter.placements
                value = distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)
            parameter.copy_(value)

    def hidden_states(
        self,
        tokens: Tensor | None,
        bounds: Any = None,
        positions: Tensor | None = None,
        cache: Any = None,
        embeddings: Tensor | None = None,
    ) -> Tensor:
        """Normalised output of the last layer, [B, T, dim].

        `bounds` (kernels.make_bounds) restricts who sees whom and then must include the sliding window;
        `positions` [T] or [B, T] default to 0..T-1; `cache` replaces attention over the sequence itself by attention
        over what it holds (core.generate); `embeddings` [B, T, dim] replace tokens (pictures).
        """
        x = self.embed(tokens) if embeddings is None else embeddings
        length = x.shape[1]
        if positions is None:
            positions = torch.arange(length, device=x.device)
        if bounds is None and 0 < self.config.sliding_window < length:
            bounds = make_bounds(length, window=self.config.sliding_window, device=x.device)
        rope = rotary_tables(positions, self.config)
        for layer in self.layers:
            x = layer(x, rope, bounds, cache)
        return self.norm(x)

    def forward(self, tokens: Tensor, bounds: Any = None, positions: Tensor | None = None) -> Tensor:
        """tokens [B, T] -> logits [B, T, V]."""
        return self.head(self.hidden_states(tokens, bounds, positions))

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        bounds: Any = None,
        positions: Tensor | None = None,
        z_loss: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy in nats, summed over the targets that are not -100, and their number.

        tokens, targets [B, T] int64. Logits are made a few rows at a time, never as [B, T, V]. `z_loss` adds
        z_loss x (log of the softmax's normaliser)^2 to each counted token (PaLM, section 5).
        """
        hidden = self.hidden_states(tokens, bounds, positions).flatten(0, 1)
        return linear_cross_entropy(hidden, self.head.weight, targets.flatten(), self.head.bias, z_loss)

    def logprobs(
        self,
        tokens: Tensor,
        targets: Tensor,
        bounds: Any = None,
        positions: Tensor | None = None,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """log p(target) under softmax(logits / temperature), and that distribution's entropy: 2 x [B, T] float32.

        Ignored targets (-100) give 0 in both. Same memory promise as `loss`.
        """
        hidden = self.hidden_states(tokens, bounds, positions).flatten(0, 1)
        out = linear_logprobs(hidden, self.head.weight, targets.flatten(), self.head.bias, temperature)
        return out[0].view_as(targets), out[1].view_as(targets)


def num_parameters(config: Config) -> int:
    """Exact count, from shapes alone."""
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(config).parameters())


def flops_per_token(config: Config, seq_len: int) -> int:
    """Training FLOPs of one token: 6 x matrix weights + 12 x layers x heads x head_dim x seq_len (PaLM, appendix B).

    Counts attention as if every query saw the whole sequence (or its window), and no recomputation.
    """
    embedding = config.vocab_size * config.dim
    matrices = num_parameters(replace(config, tied=False)) - embedding
    visible = min(seq_len, config.sliding_window or seq_len)
    return 6 * matrices + 12 * config.layers * config.heads * config.head_dim * visible
