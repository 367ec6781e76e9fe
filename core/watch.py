"""What surrounds the optimizer steps of a stage: going on, validation, the log, checkpoints, the end.

watch = Watch(run, config, model, optimizer, identity, evaluate)
for step in watch.steps():
    ...  # the stage's own: batch, loss, backward, core.optimizer.take_step
    watch.after_step(step, values, tokens)
watch.conclude(save, summary, panels)
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from core.config import RunConfig
from core.resume import Checkpointer
from core.run import Run, Speedometer, SpikeGuard, due
from model import Transformer, flops_per_token, num_parameters


class Watch:
    """A run from its first step, or where it was interrupted, to its last. All methods are collective.

    `identity` is what must be the same to go on from a checkpoint (core/resume.py). `evaluate` says how good
    the model is, by name: it is called before, every --eval_every steps, and after.
    """

    def __init__(
        self,
        run: Run,
        config: RunConfig,
        model: Transformer,
        optimizer: torch.optim.Optimizer,
        identity: dict[str, Any],
        evaluate: Callable[[], dict[str, float]],
    ) -> None:
        self.run, self.config, self.evaluate = run, config, evaluate
        self.guard, self.checkpoints = SpikeGuard(), Checkpointer(run, model, optimizer, identity)
        state = self.checkpoints.resume(self.guard)
        self.before: dict[str, float] = state.get("before") or evaluate()
        count = num_parameters(model.config)
        run.say(f"{count:,} parameters, {config.steps} steps of {config.batch_size}")
        self.speed = Speedometer(run, flops_per_token(model.config, config.seq_len))

    def steps(self) -> Iterator[int]:
        """The steps that are left to take."""
        self.run.progress(self.config.steps)
        yield from range(self.run.start_step, self.config.steps)

    def after_step(self, step: int, values: dict[str, float], tokens: int) -> None:
        """Log, validate and save where it is due. Raises UserError to end a run that was told to stop."""
        run, config = self.run, self.config
        done, stopping = step + 1, run.should_stop()
        last = done == config.steps
        self.speed.add(tokens)
        if due(config.log_every, done) or last:
            run.log(done, config.steps, **values, **self.speed.read())
        if due(config.eval_every, done) and not (last or stopping):
            run.log(done, config.steps, **self.evaluate())
            self.speed.read()
        self.checkpoints.after_step(done, last, stopping, guard=self.guard.state_dict(), before=self.before)

    def conclude(self, save: Callable[[], None], summary: dict[str, Any], panels: tuple) -> None:
        """Evaluate, save the model, write the summary, and say what has changed."""
        after = self.evaluate()
        self.run.log(self.config.steps, self.config.steps, **after)
        self.checkpoints.wait()
        save()
        self.run.finish({"before": self.before, "after": after, **summary}, panels)
        for name, value in after.items():
            self.run.say(f"  {name}: {self.before[name]:.3f} -> {value:.3f}")
