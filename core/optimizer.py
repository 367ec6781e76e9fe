"""AdamW and Muon with the right weight-decay groups, and learning-rate schedules computed from the step
alone."""

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from core.config import RunConfig
from core.parallel import clip_grad_norm
from core.run import SpikeGuard


def decay_groups(parameters: list[Tensor], weight_decay: float) -> list[dict]:
    """Weight decay on matrices (embeddings included); none on norms and biases."""
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def make_adamw(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> torch.optim.AdamW:
    """Decoupled weight decay (Loshchilov & Hutter 2019) over the parameters that require gradients."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(decay_groups(parameters, weight_decay), lr=lr, betas=betas, eps=eps, fused=True)


def make_muon(
    model: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.95)
) -> "Muon":
    """Muon for the matrices inside layers and projector, AdamW for embeddings, head, norms and biases."""
    inside = ("layers.", "projector.")
    hidden = {id(p) for name, p in model.named_parameters() if p.ndim == 2 and name.startswith(inside)}
    rest = [p for p in model.parameters() if id(p) not in hidden]
    groups = [
        {
            "params": [p for p in model.parameters() if id(p) in hidden],
            "weight_decay": weight_decay,
            "muon": True,
        }
    ]
    groups += [{**group, "muon": False} for group in decay_groups(rest, weight_decay)]
    return Muon(groups, lr, betas)


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal (Jordan et al. 2024), scaled to AdamW's update size (Liu et al. 2025, section
    2.2).

    For a matrix W [m, n] with momentum M:  W <- W (1 - lr wd) - lr 0.2 sqrt(max(m, n)) NewtonSchulz(M).
    Groups with muon=False get AdamW. Sharded matrices are gathered, since orthogonality needs the whole
    matrix.
    """

    def __init__(
        self, groups: list[dict], lr: float, betas: tuple[float, float], momentum: float = 0.95
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": 1e-8, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            update = self.orthogonal_update if group["muon"] else self.adamw_update
            for parameter in group["params"]:
                if parameter.grad is not None:
                    change = update(parameter.grad, self.state[parameter], group)
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(change, alpha=group["lr"])

    @staticmethod
    def orthogonal_update(grad: Tensor, state: dict, group: dict) -> Tensor:
        momentum = state.setdefault("momentum", torch.zeros_like(grad))
        momentum.lerp_(grad, 1 - group["momentum"])
        nesterov = grad.lerp(momentum, group["momentum"])
        whole = nesterov.full_tensor() if isinstance(nesterov, DTensor) else nesterov
        update = newton_schulz(whole) * 0.2 * math.sqrt(max(whole.shape))
        if isinstance(grad, DTensor):
            update = distribute_tensor(update, grad.device_mesh, grad.placements, src_data_rank=None)
        return update

    @staticmethod
    def adamw_update(grad: Tensor, state: dict, group: dict) -> Tensor:
        if not state:
            state.update(
                step=torch.zeros(()), exp_avg=torch.zeros_like(grad), exp_avg_sq=torch.zeros_like(grad)
            )
        first, second = group["betas"]
        state["step"] += 1
        state["exp_avg"].lerp_(grad, 1 - first)
        state["exp_avg_sq"].lerp_(grad * grad, 1 - second)
        steps = state["step"].item()
        scale = (state["exp_avg_sq"] / (1 - second**steps)).sqrt_().add_(group["eps"])
        return state["exp_avg"] / (1 - first**steps) / scale


def newton_schulz(matrix: Tensor, iterations: int = 5) -> Tensor:
    """The nearest orthogonal matrix, roughly: singular values are driven towards 1 by an odd polynomial."""
    a, b, c = 3.4445, -4.7750, 2.0315  # Jordan et al. 2024: steepest slope at 0 that still settles near 1
    x = matrix.bfloat16() if matrix.is_cuda else matrix.float()
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrix.dtype)


def learning_rate(config: RunConfig, step: int) -> float:
    """Learning rate of optimizer step `step` (0-based) of config.steps: linear warm-up, then the schedule.

    cosine: half a period down to min_lr. linear: straight down. wsd: constant, then linear down over the last
    fifth (warm-up, stable, decay; Hu et al. 2024). constant: lr.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    remaining = {
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        "linear": 1 - done,
        "wsd": min(1.0, (1 - done) / 0.2),
        "constant": 1.0,
    }[config.schedule]
    return config.min_lr + (config.lr - config.min_lr) * remaining


def take_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    guard: SpikeGuard,
    config: RunConfig,
    step: int,
    loss: float,
) -> dict[str, float]:
    """What follows the backward of every stage: clip, schedule, step unless the guard objects, clear
    gradients.

    `loss` is the same number on all processes. Returns the metrics loss, grad_norm (before clipping), lr,
    skipped.
    """
    grad_norm = clip_grad_norm(model, config.grad_clip)
    lr = learning_rate(config, step)
    set_learning_rate(optimizer, lr)
    if guard.accepts(loss, grad_norm):
        optimizer.step()
    optimizer.zero_grad()
    return {"loss": loss, "grad_norm": grad_norm, "lr": lr, "skipped": guard.skipped}


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
