"""The last layer and its loss in one step, by chunks of rows, so that the logits [N, V] never exist as a
whole.

With 32,000 words in the vocabulary the logits are the largest tensor of a training step. Each loss here needs
only a few numbers of every row of logits, so a chunk of rows is made, used and dropped. Plain PyTorch on
every device: `docs/kernels.md` counts what a fused kernel could save.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

IGNORE = -100  # a target that is not counted


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of softmax(hidden @ weight.T + bias) against targets, summed over the rows that count.

    hidden [N, D], weight [V, D], bias [V], targets [N] int64 with -100 for rows that do not count. Returns
    (loss_sum float32, count int64), both scalars; count carries no gradient. z_loss adds z_loss *
    log(sum(exp(logits)))^2 per row, which keeps the logits from drifting (PaLM, arXiv 2204.02311, section 5).
    """
    count = (targets != IGNORE).sum()
    hidden, targets = _drop_ignored(hidden, targets)
    return _LinearCrossEntropy.apply(hidden, weight, targets, bias, z_loss, torch.is_grad_enabled()), count


def linear_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target under softmax((hidden @ weight.T + bias) / temperature), and the
    entropy.

    Shapes as in `linear_cross_entropy`. Returns (logprobs [N], entropy [N]), float32 and both differentiable;
    rows whose target is -100 give 0 in both.
    """
    kept_hidden, kept_targets = _drop_ignored(hidden, targets)
    logprobs, entropy = _LinearLogprobs.apply(kept_hidden, weight, kept_targets, bias, temperature)
    if kept_targets is targets:
        return logprobs, entropy
    kept, zeros = targets != IGNORE, logprobs.new_zeros(targets.shape)
    return zeros.masked_scatter(kept, logprobs), zeros.masked_scatter(kept, entropy)


def _drop_ignored(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """On the CPU, only the rows that count: half of a conversation, say. On a GPU, where asking how many
    would make the host wait, all rows: the head is a few per cent of the work there."""
    if hidden.is_cuda or bool((targets != IGNORE).all()):
        return hidden, targets
    kept = targets != IGNORE
    return hidden[kept], targets[kept]


def _rows_per_chunk(hidden: Tensor) -> int:
    """256 rows keep a chunk of logits near the CPU's caches; a GPU needs more rows to fill its matrix
    units."""
    return 1024 if hidden.is_cuda else 256


def _wide(hidden: Tensor) -> torch.dtype:
    """What sums are kept in: float32, or float64 for float64 inputs."""
    return torch.promote_types(hidden.dtype, torch.float32)


def _chunk_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Logits of a chunk of rows, [rows, V] in at least float32 (the product itself in the inputs'
    precision)."""
    logits = (hidden @ weight.T).to(_wide(hidden))
    return logits if bias is None else logits.add_(bias)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in one pass where the precisions agree."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


class _LinearCrossEntropy(torch.autograd.Function):
    """Makes the gradient in the forward pass, while the chunk of logits is there; the backward only scales
    it."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        z_loss: float,
        grad_enabled: bool,
    ) -> Tensor:
        needs = [grad_enabled and needed for needed in ctx.needs_input_grad]
        grad_hidden = torch.empty_like(hidden) if needs[0] else None
        grad_weight = torch.zeros_like(weight, dtype=_wide(hidden)) if needs[1] else None
        grad_bias = torch.zeros_like(bias, dtype=_wide(hidden)) if needs[3] else None
        loss_sum = torch.zeros((), dtype=_wide(hidden), device=hidden.device)
        size = _rows_per_chunk(hidden)
        for start in range(0, hidden.shape[0], size):
            rows = slice(start, start + size)
            target, counted = targets[rows, None].clamp(min=0), targets[rows, None] != IGNORE  # [rows, 1]
            logits = _chunk_logits(hidden[rows], weight, bias)
            at_target = logits.gather(1, target)
            largest = logits.amax(1, keepdim=True)
            exponentials = logits.sub_(largest).exp_()  # in place: the chunk is the largest tensor here
            total = exponentials.sum(1, keepdim=True)
            log_total = total.log() + largest  # log(sum(exp(logits)))
            loss_sum += ((log_total - at_target + z_loss * log_total.square()) * counted).sum()
            if not any(needs):
                continue
            # d loss / d logits = softmax * (1 + 2 z log_total) - one_hot(target), on counted rows
            grad_logits = exponentials.mul_((1 + 2 * z_loss * log_total) * counted / total)
            grad_logits.scatter_add_(1, target, -counted.to(grad_logits.dtype))
            low = grad_logits.to(hidden.dtype)
            if needs[0]:
                torch.mm(low, weight, out=grad_hidden[rows])
            if needs[1]:
                _add_product(grad_weight, low.T, hidden[rows])
            if needs[3]:
                grad_bias += grad_logits.sum(0)
        grads = [grad_hidden, grad_weight, grad_bias]
        dtypes = [hidden.dtype, weight.dtype, None if bias is None else bias.dtype]
        grads = [None if g is None else g.to(dtype) for g, dtype in zip(grads, dtypes, strict=True)]
        ctx.save_for_backward(*grads)
        return loss_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias = (
            None if grad is None else grad * grad_loss.to(grad.dtype) for grad in ctx.saved_tensors
        )
        return grad_hidden, grad_weight, None, grad_bias, None, None


class _LinearLogprobs(torch.autograd.Function):
    """Keeps two numbers a row, and makes each chunk of logits again in the backward pass."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        logprobs = torch.zeros(targets.shape, dtype=_wide(hidden), device=hidden.device)
        entropy, log_total = torch.zeros_like(logprobs), torch.zeros_like(logprobs)
        size = _rows_per_chunk(hidden)
        for start in range(0, hidden.shape[0], size):
            rows = slice(start, start + size)
            target, counted = targets[rows, None].clamp(min=0), targets[rows] != IGNORE
            logits = _chunk_logits(hidden[rows], weight, bias).div_(temperature)
            log_total[rows] = logits.logsumexp(1)
            logprobs[rows] = (logits.gather(1, target)[:, 0] - log_total[rows]) * counted
            # entropy = log_total - sum_j p_j logits_j
            expected = torch.linalg.vecdot((logits - log_total[rows, None]).exp_(), logits)
            entropy[rows] = (log_total[rows] - expected) * counted
        ctx.save_for_backward(hidden, weight, targets, bias, log_total, entropy)
        ctx.temperature = temperature
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, bias, log_total, entropy = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if needs[0] else None
        grad_weight = torch.zeros_like(weight, dtype=_wide(hidden)) if needs[1] else None
        grad_bias = torch.zeros_like(bias, dtype=_wide(hidden)) if needs[3] else None
        size = _rows_per_chunk(hidden)
        for start in range(0, hidden.shape[0], size):
            rows = slice(start, start + size)
            target, counted = targets[rows, None].clamp(min=0), targets[rows, None] != IGNORE
            by_logprob, by_entropy = grad_logprobs[rows, None] * counted, grad_entropy[rows, None] * counted
            logits = _chunk_logits(hidden[rows], weight, bias).div_(ctx.temperature)
            logp = logits.sub_(log_total[rows, None])
            # d logp_t / d logit_j = [j = t] - p_j        d entropy / d logit_j = -p_j (log p_j + entropy)
            slope = logp.exp()
            slope.mul_(logp.add_(entropy[rows, None]).mul_(by_entropy).add_(by_logprob)).neg_()
            slope.scatter_add_(1, target, by_logprob)
            low = slope.div_(ctx.temperature).to(hidden.dtype)
            if needs[0]:
                torch.mm(low, weight, out=grad_hidden[rows])
            if needs[1]:
                _add_product(grad_weight, low.T, hidden[rows])
            if needs[3]:
                grad_bias += slope.sum(0)
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None if grad_bias is None else grad_bias.to(bias.dtype), None
