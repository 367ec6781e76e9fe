"""The model: one decoder for both published systems.

Moxin-7B (arXiv 2412.06845, section 3) is a Mistral-type decoder: RMSNorm before each sub-layer, grouped-query
attention with rotary positions and an optional sliding window, SwiGLU, no biases. MOSS-16B (DOI
10.1007/s11633-024-1502-8) is a CodeGen-type decoder: one LayerNorm feeds attention and MLP side by side,
GELU, rotary positions on the first 64 of 256 dimensions. The switches between them are fields of `Config`.

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
        for name in "vocab_size layers dim heads kv_heads head_dim ffn_dim max_seq_len".split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.rotary % 2 or self.rotary > self.head_dim:
            raise ValueError(f"rotary_dim ({self.rotary}) must be even, at most head_dim ({self.head_dim})")

    @property
    def rotary(self) -> int:
        return self.rotary_dim or self.head_dim


PRESETS: dict[str, Config] = {
    # Made here. At these widths matrices of std 0.02 learn slowly at first: theirs is 1 / sqrt(dim). What a
    # minute of a processor teaches is best spread over few parameters and many tokens: tiny has 0.34 million.
    "tiny": Config(
        vocab_size=2048,
        layers=4,
        dim=64,
        heads=2,
        kv_heads=2,
        head_dim=32,
        ffn_dim=192,
        max_seq_len=1024,
        rope_theta=1e10,  # most of a head does not turn: what was said is found wherever it stands
        tied=True,
        init_std=64**-0.5,
    ),
    "small": Config(
        vocab_size=32_000,
        layers=12,
        dim=768,
        heads=12,
        kv_heads=4,
        ffn_dim=2048,
        max_seq_len=4096,
        init_std=768**-0.5,
    ),  # 124,668,672 parameters
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
    """cos and sin of position x frequency (Su et al. 2021, eq. 15): [T] or [B, T] -> 2 x [.., T, 1, R].

    The two halves of R are for the two members of a pair; the sine of the first is negative.
    """
    even = torch.arange(0, config.rotary, 2, device=positions.device, dtype=torch.float32)
    angles = positions[..., None].float() * (1.0 / config.rope_theta ** (even / config.rotary))
    cos, sin = angles.cos().unsqueeze(-2), angles.sin().unsqueeze(-2)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each pair (i, i + R/2) of the first R dimensions by its angle; x [B, T, heads, D].

    (a, b) -> (a, b) cos + (b, a) (-sin, sin), in float32 and in few passes over memory.
    """
    cos, sin = rope
    width = cos.shape[-1]
    pairs, rest = x[..., :width].float(), x[..., width:]
    turned = (pairs * cos + pairs.roll(width // 2, -1) * sin).to(x.dtype)
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

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], bounds: Any = None, cache: Any = None
    ) -> Tensor:
        if self.recompute is not None and torch.is_grad_enabled():
            return self.recompute(self.body, x, rope, bounds, cache)
        return self.body(x, rope, bounds, cache)

    def body(self, x: Tensor, rope: tuple[Tensor, Tensor], bounds: Any, cache: Any) -> Tensor:
        normed = self.attention_norm(x)
        attended = x + self.attention(normed, rope, bounds, cache)
        return attended + self.mlp(normed if self.mlp_norm is None else self.mlp_norm(attended))


def seeded(seed: int, name: str) -> torch.Generator:
    """A generator of a tensor's own, so that its values do not depend on what was drawn before it."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))


def assign(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into a parameter, of which this process may hold only a shard."""
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        value = distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)
    parameter.copy_(value)


class Transformer(nn.Module):
    """Decoder-only language model: tokens [B, T] int64 -> logits [B, T, V].

    Build under `torch.device("meta")` to get shapes without memory; otherwise weights are initialised from
    `seed`.
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
        """Matrices N(0, init_std), those that write to the residual stream N(0, init_std / sqrt(2 layers))
        (GPT-2, section 2.3); norms 1; biases 0. Each tensor has its own generator, seeded by its name, so the
        values do not depend on how many processes share the model or on which layers exist beside it."""
        for name, parameter in self.named_parameters():
            value = torch.zeros(parameter.shape) if name.endswith("bias") else torch.ones(parameter.shape)
            if parameter.ndim > 1:
                residual = name.endswith(("attention.o.weight", "mlp.down.weight"))
                std = self.config.init_std / (math.sqrt(2 * self.config.layers) if residual else 1)
                value.normal_(0, std, generator=seeded(seed, name))
            assign(parameter, value)

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
        `positions` [T] or [B, T] default to 0..T-1; `cache` replaces attention over the sequence itself by
        attention over what it holds (core.generate); `embeddings` [B, T, dim] replace tokens (pictures).
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

    def forward(
        self, tokens: Tensor, bounds: Any = None, positions: Tensor | None = None, **inputs: Any
    ) -> Tensor:
        """tokens [B, T] -> logits [B, T, V]. Further `inputs`, here and below, go to `hidden_states`
        (pictures)."""
        return self.head(self.hidden_states(tokens, bounds, positions, **inputs))

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        bounds: Any = None,
        positions: Tensor | None = None,
        z_loss: float = 0.0,
        **inputs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy in nats, summed over the targets that are not -100, and their number.

        tokens, targets [B, T] int64. Logits are made a few rows at a time, never as [B, T, V]. `z_loss` adds
        z_loss x (log of the softmax's normaliser)^2 to each counted token (PaLM, section 5).
        """
        hidden = self.hidden_states(tokens, bounds, positions, **inputs).flatten(0, 1)
        return linear_cross_entropy(hidden, self.head.weight, targets.flatten(), self.head.bias, z_loss)

    def logprobs(
        self,
        tokens: Tensor,
        targets: Tensor,
        bounds: Any = None,
        positions: Tensor | None = None,
        temperature: float = 1.0,
        **inputs: Any,
    ) -> tuple[Tensor, Tensor]:
        """log p(target) under softmax(logits / temperature), and that distribution's entropy: 2 x [B, T]
        float32.

        Ignored targets (-100) give 0 in both. Same memory promise as `loss`.
        """
        hidden = self.hidden_states(tokens, bounds, positions, **inputs).flatten(0, 1)
        out = linear_logprobs(hidden, self.head.weight, targets.flatten(), self.head.bias, temperature)
        return out[0].view_as(targets), out[1].view_as(targets)


def num_parameters(config: Config) -> int:
    """Exact count, from shapes alone."""
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(config).parameters())


def flops_per_token(config: Config, seq_len: int) -> int:
    """Training FLOPs of one token: 6 x matrix weights + 12 x layers x heads x head_dim x seq_len (PaLM,
    appendix B).

    Counts attention as if every query saw the whole sequence (or its window), and no recomputation.
    """
    embedding = config.vocab_size * config.dim
    matrices = num_parameters(replace(config, tied=False)) - embedding
    visible = min(seq_len, config.sliding_window or seq_len)
    return 6 * matrices + 12 * config.layers * config.heads * config.head_dim * visible


# ----------------------------------------------------------------------------------------------------------
# Vision: one ViT class for DINOv2 and SigLIP, the projector, and the language model that sees.


@dataclass(frozen=True)
class VisionConfig:
    """Shape of a vision transformer; the defaults are DINOv2 ViT-L/14 with four registers at 224 pixels."""

    image_size: int = 224  # side of the square picture, pixels
    patch_size: int = 14  # side of a patch; what does not fill a patch (384 = 27 x 14 + 6) is not seen
    dim: int = 1024
    depth: int = 24  # blocks of the published encoder; those behind the features in use are not built
    heads: int = 16
    mlp: int = 4096  # hidden width of the feed-forward part
    class_token: bool = True
    registers: int = 4  # learned tokens without a position (arXiv 2309.16588)
    layer_scale: bool = True
    tanh_gelu: bool = False  # SigLIP's own code: True; timm, through which Prismatic and Moxin trained: False
    norm_eps: float = 1e-6
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # of the pixels in [0, 1], subtracted
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)  # ... and divided by

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def prefix(self) -> int:
        """Tokens before the patches."""
        return self.class_token + self.registers


SIGLIP_PIXELS = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
NO_PREFIX = {"class_token": False, "registers": 0, "layer_scale": False}  # SigLIP has patches only
SO400M = VisionConfig(dim=1152, depth=27, mlp=4304, **NO_PREFIX, **SIGLIP_PIXELS)
TOY = VisionConfig(image_size=48, patch_size=8, dim=64, depth=4, heads=4, mlp=256)
VISION_PRESETS: dict[str, VisionConfig] = {
    "dinov2-large": VisionConfig(),  # timm's vit_large_patch14_reg4_dinov2.lvd142m: 304.4 M parameters
    "siglip-so400m-224": SO400M,  # timm's vit_so400m_patch14_siglip_224.webli: 427.7 M with its pooling head
    "siglip-so400m-384": replace(SO400M, image_size=384),
    "dino-tiny": TOY,
    "siglip-tiny": replace(TOY, **NO_PREFIX, **SIGLIP_PIXELS),
}


class VisionAttention(nn.Module):
    """Self-attention in which every token sees every token. Parameter names are timm's, here and below."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.proj = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, C // self.heads).unbind(2)  # each [B, T, H, D]
        return self.proj(attention(q, k, v, causal=False).reshape(B, T, C))


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.dim, config.mlp)
        self.fc2 = nn.Linear(config.mlp, config.dim)
        self.approximate = "tanh" if config.tanh_gelu else "none"

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


class LayerScale(nn.Module):
    """A learned factor for each channel of a branch (Touvron et al. 2021); DINOv2 has it, SigLIP does not."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, config.norm_eps)
        self.attn = VisionAttention(config)
        self.ls1 = LayerScale(config.dim) if config.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(config.dim, config.norm_eps)
        self.mlp = VisionMLP(config)
        self.ls2 = LayerScale(config.dim) if config.layer_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Cuts the picture into patches and projects each: a convolution whose stride is its width."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.dim, config.patch_size, stride=config.patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels).flatten(2).transpose(1, 2)  # [B, 3, H, W] -> [B, grid * grid, dim]


class VisionEncoder(nn.Module):
    """DINOv2 or SigLIP, by configuration.

    Prismatic (arXiv 2402.07865) reads the output of the second-to-last block without the final norm, so by
    default the last block and the norm are not built (12.6 M and 15.2 M parameters saved). SigLIP's pooling
    head never is.

    Args:
        upto: -2 builds the blocks up to the second-to-last; -1 builds all of them and the final norm.
    """

    def __init__(self, config: VisionConfig, upto: int = -2, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        if config.class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        if config.registers:
            self.reg_token = nn.Parameter(torch.zeros(1, config.registers, config.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.grid**2, config.dim))  # patches only
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth + 1 + upto))
        if upto == -1:
            self.norm = nn.LayerNorm(config.dim, config.norm_eps)
        if not self.pos_embed.is_meta:
            self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Matrices and tokens N(0, 0.02), biases 0, norms and scales 1."""
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                assign(parameter, torch.empty(parameter.shape).normal_(0, 0.02, generator=seeded(seed, name)))
            else:
                assign(parameter, torch.full(parameter.shape, float(not name.endswith("bias"))))

    def forward(self, pixels: Tensor, layer: int = -2) -> Tensor:
        """Patch features of a block.

        Args:
            pixels: [B, 3, image_size, image_size], normalised with the encoder's own mean and std.
            layer: which block's output, counted from the published encoder's last; -1 adds the final norm.

        Returns:
            [B, grid * grid, dim], class and register tokens dropped.

        Raises:
            ValueError: if the block was not built.
        """
        config = self.config
        wanted = config.depth + 1 + layer
        if not 0 < wanted <= len(self.blocks):
            raise ValueError(
                f"layer {layer} of {config.depth} is not built: VisionEncoder(..., upto={layer})"
            )
        x = self.patch_embed(pixels) + self.pos_embed
        prefix = [self.cls_token] if config.class_token else []
        prefix += [self.reg_token] if config.registers else []
        x = torch.cat(
            [token.expand(len(x), -1, -1) for token in prefix] + [x], dim=1
        )  # [B, prefix + patches, dim]
        for block in self.blocks[:wanted]:
            x = block(x)
        return (self.norm(x) if layer == -1 else x)[:, config.prefix :]


def normalise(pictures: Tensor, config: VisionConfig) -> Tensor:
    """Bytes -> what the encoder was trained on: uint8 [B, 3, H, W] -> float32 (x / 255 - mean) / std."""
    mean = torch.tensor(config.mean, device=pictures.device).view(3, 1, 1)
    std = torch.tensor(config.std, device=pictures.device).view(3, 1, 1)
    return (pictures.float() / 255 - mean) / std


class VisionTower(nn.Module):
    """Frozen encoders side by side: their features of a patch are joined, DINOv2's before SigLIP's.

    Kept apart from the language model: it is not trained, not sharded, not in checkpoints, and what it says
    of a picture can be kept on disk.
    """

    def __init__(self, encoders: list[VisionEncoder]) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.configs = tuple(encoder.config for encoder in encoders)
        shapes = {(config.image_size, config.grid) for config in self.configs}
        if len(shapes) != 1:
            raise ValueError(f"encoders that see a picture together need one size and one grid, got {shapes}")
        (self.image_size, grid) = shapes.pop()
        self.tokens, self.dim = grid**2, sum(config.dim for config in self.configs)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Tensor:
        """uint8 [B, encoders, 3, S, S], one picture as each encoder wants it -> [B, tokens, dim]."""
        features = []
        for encoder, view in zip(self.encoders, pictures.unbind(1), strict=True):
            features.append(encoder(normalise(view, encoder.config).to(encoder.pos_embed.dtype)))
        return torch.cat(features, dim=-1)


class Projector(nn.Module):
    """Visual features -> embeddings of the language model: Prismatic's `fused-gelu-mlp`, three linear layers.

    For Moxin 2176 -> 8704 -> 4096 -> 4096: 71,385,600 parameters. (Prismatic's paper says 2, its code 3.)
    """

    def __init__(self, vision_dim: int, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(vision_dim, 4 * vision_dim)
        self.fc2 = nn.Linear(4 * vision_dim, dim)
        self.fc3 = nn.Linear(dim, dim)

    def forward(self, features: Tensor) -> Tensor:
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(features)))))


PATCH = (
    -1
)  # stands in a sequence of token ids for one patch of a picture; no tokenizer and no sampler yields it


class VLM(Transformer):
    """A language model that sees: where its tokens say PATCH, a patch of a picture takes the place of a word.

    A picture of N patches takes N places; places and patches are matched in order. Everything else, causal
    attention and positions included, is as for text.
    """

    def __init__(self, config: Config, vision_dim: int, seed: int = 0) -> None:
        super().__init__(config, seed)
        self.vision_dim = vision_dim
        self.projector = Projector(vision_dim, config.dim)
        if not self.embed.weight.is_meta:
            self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """The decoder's as ever; the projector's so that patches come out as far apart as they went in.

        Variance 2 / inputs, no bias (He et al. 2015). With PyTorch's default for Linear, which Prismatic
        keeps, the biases outweigh what three layers leave of the differences between patches.
        """
        super().init_weights(seed)
        for name, parameter in self.named_parameters():
            if name.startswith("projector."):
                value = torch.zeros(parameter.shape)
                if value.ndim == 2:
                    value.normal_(0, (2 / value.shape[1]) ** 0.5, generator=seeded(seed, name))
                assign(parameter, value)

    def splice(self, tokens: Tensor, features: Tensor | None) -> Tensor:
        """tokens [B, T] and features [pictures, patches, vision_dim] -> embeddings [B, T, dim].

        Raises:
            ValueError: if there are not as many places as patches.
        """
        places = tokens == PATCH
        embeddings = self.embed(tokens.masked_fill(places, 0))
        wanted, patches = int(places.sum()), 0 if features is None else features.shape[:2].numel()
        if wanted != patches:
            raise ValueError(f"{wanted} places for {patches} patches")
        if features is None or not patches:
            # Another process may have a picture: without a gradient here, their collectives would not match.
            return embeddings + 0 * self.projector(embeddings.new_zeros(1, self.vision_dim)).sum()
        projected = self.projector(features.to(embeddings.dtype)).flatten(0, 1)
        return embeddings.masked_scatter(places[..., None], projected.to(embeddings.dtype))

    def hidden_states(
        self,
        tokens: Tensor | None,
        bounds: Any = None,
        positions: Tensor | None = None,
        cache: Any = None,
        embeddings: Tensor | None = None,
        features: Tensor | None = None,
    ) -> Tensor:
        """As Transformer's; `features` [pictures, patches, vision_dim] come from the VisionTower."""
        if embeddings is None:
            embeddings = self.splice(tokens, features)
        return super().hidden_states(tokens, bounds, positions, cache, embeddings)
