"""One model over many processes: FSDP2 sharding, precision, activation checkpointing, compile, clipping.

Each decoder layer is a sharding unit: its weights are gathered before it runs and freed after, gradients are
reduce-scattered to their owners (ZeRO stage 3, Rajbhandari et al. 2020). Embedding, final norm and head form
the root unit, because the chunked loss reads the head's weight outside the head's own forward.
"""

import contextlib
import functools
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from core.config import require
from core.run import Run
from model import Config, Transformer


def parallelize(model: Transformer, run: Run) -> Transformer:
    """Apply activation checkpointing, compile and sharding as the run's configuration asks, in place.

    The model may be on the meta device; `materialize` then gives it memory. One process in float32 is left
    unsharded.
    """
    config = run.config
    for layer in model.layers:
        layer.recompute = RECOMPUTE[config.checkpointing]
        if config.compile:
            layer.compile()
    if run.world_size > 1 or run.dtype != torch.float32:
        shard(model, list(model.layers), run, methods=("loss", "logprobs"))
    return model


def shard(model: nn.Module, units: list[nn.Module], run: Run, methods: tuple[str, ...]) -> None:
    """fully_shard each unit, then the root. `methods` are entry points besides forward that need the root
    gathered; none may call another of them or forward, since the inner one would free the root's weights
    under the outer."""
    mesh = device_mesh(run)
    precision = MixedPrecisionPolicy(param_dtype=run.dtype, reduce_dtype=torch.float32)
    for module in [*units, model]:
        fully_shard(module, mesh=mesh, mp_policy=precision)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Losses are divided by the global token count already, so gradients are summed, not averaged.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    # FSDP sets itself up in the root's first call, but sampling enters by the layers: `unsharded` calls this.
    model.wake = lambda: None
    for method in (*methods, "wake"):
        register_fsdp_forward_method(model, method)


def device_mesh(run: Run) -> dist.DeviceMesh:
    """All processes in one sharding group; over several nodes, copies between nodes and shards inside
    (HSDP)."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", run.world_size))
    if local == run.world_size:
        return init_device_mesh(run.device.type, (run.world_size,), mesh_dim_names=("shard",))
    require(run.world_size % local == 0, f"{run.world_size} processes do not divide into nodes of {local}")
    shape = (run.world_size // local, local)
    return init_device_mesh(run.device.type, shape, mesh_dim_names=("replicate", "shard"))


def materialize(model: Transformer, run: Run) -> Transformer:
    """Give a meta-device model memory on the run's device; its values are then undefined until initialised or
    loaded."""
    model.to_empty(device=run.device)
    if model.config.tied:
        model.head.weight = model.embed.weight
    return model


@contextlib.contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Inside, every process holds the whole weights, so that generating needs no communication and processes
    may do unequal work. Costs one full copy of the weights in the compute type."""
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if parts:
        model.wake()
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not model, recurse=False)
            part.reshard()


def new_model(shape: Config, run: Run) -> Transformer:
    """A model of this shape, parallelized, its values not yet defined: initialise them or load weights."""
    with torch.device("meta"):
        model = Transformer(shape)
    return materialize(parallelize(model, run), run)


def clip_grad_norm(model: nn.Module, largest: float) -> float:
    """Global gradient norm before clipping; scales gradients down to `largest` where it is above 0."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.clip_grad_norm_(parameters, largest if largest > 0 else float("inf"))
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def _save_policy(
    context: object, operation: object, *arguments: object, **keywords: object
) -> CheckpointPolicy:
    """Selective checkpointing keeps what is dear to compute: matrix products and attention."""
    dear = str(operation).split(".")[:2] in DEAR
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE


DEAR = [
    ["aten", "mm"],
    ["aten", "addmm"],
    ["aten", "_scaled_dot_product_flash_attention_for_cpu"],
    ["aten", "_scaled_dot_product_flash_attention"],
    ["aten", "_scaled_dot_product_efficient_attention"],
    ["aten", "_scaled_dot_product_cudnn_attention"],
    ["nanomoxin", "flash_forward"],
]

RECOMPUTE = {
    "none": None,
    "full": functools.partial(checkpoint, use_reentrant=False),
    "selective": functools.partial(
        checkpoint,
        use_reentrant=False,
        context_fn=functools.partial(create_selective_checkpoint_contexts, _save_policy),
    ),
}
