"""--dry_run: what a run will cost, from shapes alone. Arithmetic, not measurement; the formulas stand
below."""

import dataclasses
import os

from core.config import RunConfig
from model import Config, flops_per_token, num_parameters

GB = 1e9


def memory_per_device(config: RunConfig, shape: Config, processes: int) -> dict[str, float]:
    """Bytes on each device under full sharding, by kind.

    Weights, gradients and two AdamW moments are float32 and sharded (16 bytes a parameter / processes). Two
    gathered layers and the root unit are whole, in the compute type. A layer stores about 6.5 dim + 3 ffn_dim
    values a token for its backward, half of that with selective checkpointing, its input alone with full. The
    chunked loss holds 1,024 rows of float32 logits and their gradient.
    """
    parameters = num_parameters(shape)
    value = 4 if config.dtype == "float32" or config.device == "cpu" else 2
    root = (2 - shape.tied) * shape.vocab_size * shape.dim
    layer = (parameters - root) / shape.layers
    tokens = config.micro_batch_size * config.seq_len
    per_token = {
        "none": 6.5 * shape.dim + 3 * shape.ffn_dim,
        "selective": 0.5 * (6.5 * shape.dim + 3 * shape.ffn_dim),
        "full": shape.dim,
    }[config.checkpointing]
    gathered = 0 if processes == 1 and value == 4 else value * (2 * layer + root)
    return {
        "weights": 4 * parameters / processes,
        "gradients": 4 * parameters / processes,
        "optimizer": 8 * parameters / processes,
        "gathered": gathered,
        "activations": value * per_token * shape.layers * tokens + 8 * min(tokens, 1024) * shape.vocab_size,
    }


def print_estimate(config: RunConfig, shape: Config) -> None:
    """Print the resolved configuration and what it will take."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    tokens = config.steps * config.batch_size * config.seq_len
    per_token = flops_per_token(shape, config.seq_len)
    for name, value in dataclasses.asdict(config).items():
        print(f"  {name} = {value}")
    print(f"parameters      {num_parameters(shape):,}")
    print(
        f"tokens          {tokens:,} ({config.batch_size * config.seq_len:,} a step, {config.steps:,} steps)"
    )
    print(f"training FLOPs  {tokens * per_token:.3g} ({per_token:,} a token)")
    memory = memory_per_device(config, shape, processes)
    parts = ", ".join(f"{name} {size / GB:.2f}" for name, size in memory.items())
    print(f"memory a device {sum(memory.values()) / GB:.2f} GB on {processes} process(es): {parts}")
