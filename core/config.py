"""A dataclass is the command line.

Each stage declares its options as a dataclass, one commented field a line, and its presets as a dict. This
file turns `--key value` arguments into an instance, prints `--help` from the same comments, and turns every
mistake into one line that says what, where and how to mend it (exit code 2 for usage, 1 for failure).
"""

import dataclasses
import difflib
import inspect
import io
import os
import sys
import time
import tokenize
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeVar

C = TypeVar("C")


class UserError(Exception):
    """Something the user can mend: shown as one line, exit code 1."""

    exit_code = 1


class UsageError(UserError):
    """A wrong flag, value or combination: shown as one line, exit code 2."""

    exit_code = 2


@dataclasses.dataclass(kw_only=True)
class RunConfig:
    """Fields of every training stage that are about the run, not the algorithm."""

    preset: str = "auto"  # named set of values; auto = tiny without a CUDA device, small with one
    out: str = ""  # run folder; empty = runs/STAGE-PRESET
    init_from: str = ""  # start from this model folder or hub id; empty = the stage's own default
    resume: bool = False  # continue from the newest complete checkpoint in --out
    seed: int = 0  # seeds initialisation, data order and sampling
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto = cuda where there is one
    dtype: Literal["auto", "float32", "bfloat16"] = (
        "auto"  # compute type; auto = bfloat16 on cuda, float32 on cpu
    )
    compile: bool = False  # torch.compile each layer
    checkpointing: Literal["none", "selective", "full"] = (
        "none"  # recompute activations in backward to save memory
    )
    steps: int = 1000  # optimizer steps
    seq_len: int = 256  # tokens in a sequence
    batch_size: int = 16  # sequences in one optimizer step, over all processes
    micro_batch_size: int = 16  # sequences in one forward on one process
    lr: float = 1e-3  # peak learning rate
    min_lr: float = 0.0  # learning rate at the end of the schedule
    warmup_steps: int = 0  # steps of linear warm-up
    schedule: Literal["cosine", "linear", "constant", "wsd"] = (
        "cosine"  # shape of the learning rate after warm-up
    )
    weight_decay: float = 0.1  # decoupled weight decay on matrices; never on norms and biases
    grad_clip: float = 1.0  # largest global gradient norm; 0 = no clipping
    log_every: int = 10  # steps between lines in metrics.jsonl
    eval_every: int = 100  # steps between validations; 0 = only before and after
    save_every: int = 100  # steps between checkpoints; 0 = only at the end
    keep_checkpoints: int = 2  # newest checkpoints kept
    dry_run: bool = False  # print configuration, parameters, tokens, FLOPs and memory, then stop

    def __post_init__(self) -> None:
        for name in ("steps", "seq_len", "batch_size", "micro_batch_size", "log_every", "keep_checkpoints"):
            require(getattr(self, name) > 0, f"--{name} must be at least 1, got {getattr(self, name)}")
        for name in (
            "lr",
            "min_lr",
            "warmup_steps",
            "weight_decay",
            "grad_clip",
            "eval_every",
            "save_every",
            "seed",
        ):
            require(getattr(self, name) >= 0, f"--{name} must not be negative, got {getattr(self, name)}")


def comments_of(config_class: type) -> dict[str, str]:
    """The trailing comment of each field, base classes included: the help text is written once, beside the
    field."""
    found: dict[str, str] = {}
    for cls in reversed(config_class.__mro__):
        if not dataclasses.is_dataclass(cls):
            continue
        name = None
        for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(cls)).readline):
            if token.type == tokenize.NAME and token.line.strip().startswith(f"{token.string}:"):
                name = token.string
            elif token.type == tokenize.COMMENT and name:
                found[name] = token.string.lstrip("# ")
                name = None
    return found


def convert(text: str, hint: Any) -> Any:
    """One command-line word as a value of the annotated type; ValueError says what was expected."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if text not in arguments:
            raise ValueError(f"one of {', '.join(arguments)}")
        return text
    if origin in (types.UnionType, typing.Union):
        rest = next(a for a in arguments if a is not type(None))
        return None if text.lower() == "none" else convert(text, rest)
    if origin is tuple:
        return tuple(convert(part, arguments[0]) for part in text.split(",") if part)
    if hint is bool:
        if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise ValueError("true or false")
        return text.lower() in ("true", "1", "yes")
    if hint is str:
        return text
    try:
        return int(text.replace("_", "")) if hint is int else float(text)
    except ValueError:
        raise ValueError("a whole number" if hint is int else "a number") from None


def parse(
    config_class: type[C], presets: dict[str, dict[str, Any]], argv: list[str] | None = None, about: str = ""
) -> C:
    """Command line -> configuration: defaults < preset < flags.

    Accepts `--key value`, `--key=value`, and `--flag` alone for booleans; a tuple field takes several words.
    Raises UsageError for anything it does not know, naming the nearest valid name.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    hints = typing.get_type_hints(config_class)
    names = [field.name for field in dataclasses.fields(config_class)]
    if "--help" in argv or "-h" in argv:
        print(help_text(config_class, presets, about))
        raise SystemExit(0)
    given: dict[str, Any] = {}
    while argv:
        flag, equals, word = argv.pop(0).partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or name not in names:
            raise UsageError(f"unknown argument {flag!r}{nearest(name, names, '--')} (--help lists all)")
        hint = hints[name]
        if equals:
            words = [word]
        elif typing.get_origin(hint) is tuple:
            words = []
            while argv and not argv[0].startswith("--"):
                words.append(argv.pop(0))
            word = ",".join(words)
        else:
            takes_none = hint is bool and (not argv or argv[0].startswith("--"))
            words = ["true"] if takes_none else argv[:1]
            del argv[: 0 if takes_none else 1]
            word = words[0] if words else ""
        if not words:
            raise UsageError(f"--{name} needs a value")
        try:
            given[name] = convert(word, hint)
        except ValueError as error:
            raise UsageError(f"--{name} {word!r}: expected {error}") from None
    return resolve(config_class, presets, given)


def resolve(config_class: type[C], presets: dict[str, dict[str, Any]], given: dict[str, Any]) -> C:
    """Defaults < preset < given values, with the preset's name checked."""
    preset = given.get("preset") or config_class.__dataclass_fields__["preset"].default
    reason = ""
    if preset == "auto":
        import torch

        on_gpu = torch.cuda.is_available() and given.get("device") != "cpu"
        preset = "small" if on_gpu else "tiny"
        reason = " (a CUDA device is present)" if on_gpu else " (no CUDA device in use)"
    if preset not in presets:
        raise UsageError(
            f"--preset {preset!r}: no such preset{nearest(preset, presets)}; one of {', '.join(presets)}"
        )
    config = config_class(**{**presets[preset], **given, "preset": preset})
    if len(presets) > 1 and int(os.environ.get("RANK", 0)) == 0:
        print(f"preset {preset}{reason}", flush=True)
    return config


def nearest(name: str, names: Iterable[str], prefix: str = "") -> str:
    """', did you mean ...?' or nothing."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f", did you mean {prefix}{close[0]}?" if close else ""


def help_text(config_class: type, presets: dict[str, dict[str, Any]], about: str) -> str:
    comments = comments_of(config_class)
    lines = [about.strip(), "", "Options (default):"]
    for field in dataclasses.fields(config_class):
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        lines.append(f"  --{field.name} ({default!r})".ljust(34) + " " + comments.get(field.name, ""))
    return "\n".join(lines + ["", "Presets:"] + [f"  {name}: {values}" for name, values in presets.items()])


def require(condition: bool, message: str) -> None:
    """UsageError unless the condition holds."""
    if not condition:
        raise UsageError(message)


def run_main(main: Callable[[], None]) -> None:
    """Run a script's main; an error that the user can mend becomes one line on stderr and its exit code."""
    try:
        main()
    except (UserError, OSError) as error:
        if int(os.environ.get("RANK", 0)):
            time.sleep(3)  # the first process most likely says the same, and its exit ends this one
        sys.stderr.write(f"error: {error}\n")
        sys.stderr.flush()
        # Other processes may wait in a collective for this one, so leave without their agreement.
        os._exit(getattr(error, "exit_code", 1))
