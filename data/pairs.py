"""Comparisons from AI feedback: sample answers of our own model, let a judge compare them, keep what it says
in both orders.

    python data/pairs.py --model FOLDER --prompts FILE --out runs/pairs
    python data/pairs.py --model FOLDER --prompts conversations --count 500 --out runs/pairs
    python data/pairs.py --model FOLDER --prompts FILE --judge http://HOST/v1 --judge_model NAME

MOSS built its preference data so, from some 180,000 contexts (OpenMOSS/MOSS, README; the paper's abstract
says "AI feedback"); the number of samples, the judges and the rule of both orders are ours.

One line a prompt, in order: its messages, all `responses` and, where two could be told apart, `chosen` and
`rejected`. dpo.py and preference.py read this file, and `preference.py --score` all of its responses. The
same command goes on where it was interrupted, at any instant: every line is a function of the settings and
its number, and half a line is cut off and made again.
"""

import itertools
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, TypeVar

if __name__ == "__main__":  # run as a file: import from the repository, not from data/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from core.checkpoint import load_pretrained, resolve_folder, weight_files
from core.config import UserError, parse, require, run_main
from core.decode import pack_weights
from core.run import Run, write_json
from data.demonstrations import teach
from data.judges import Judge, RuleJudge, chat_format_of, in_both_orders, make_judge
from data.pair_batches import PairConfig, PairData, load_pairs
from data.problems import Problems
from data.prompts import Prompt, read_prompts
from data.readers import Message
from data.replies import replies
from data.tokenizer import load_tokenizer

C = TypeVar("C", bound=PairConfig)


@dataclass(kw_only=True)
class Config:
    preset: str = "default"
    model: str = ""  # model folder or hub id that answers
    prompts: str = "conversations"  # a file, conversations, or a made task such as sorting
    out: str = "runs/pairs"  # folder for pairs.jsonl, or a .jsonl file, to write or to go on with
    judge: str = "rule"  # rule, model:FOLDER, or the address of an OpenAI-compatible endpoint
    judge_model: str = ""  # the model that the endpoint is asked for
    count: int = 1000  # prompts; 0 = all of a file
    num_samples: int = 4  # answers to each
    comparisons: int = 6  # of a prompt's answers, at most; it is done when one has a verdict
    temperature: float = 1.0  # MOSS's is not published; 0.7 to 1 is usual
    top_p: float = 1.0  # sample from the most probable tokens that hold this much; 1 = all
    max_new_tokens: int = 256  # longest answer; one cut off there is not compared
    seed: int = 0  # seeds prompts, sampling, and which answers are compared
    chunk: int = 64  # prompts answered together
    max_batch: int = 256  # answers sampled at a time
    workers: int = 8  # comparisons asked of an endpoint at a time
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto = cuda where there is one

    def __post_init__(self) -> None:
        require(
            self.num_samples > 1, "--num_samples must be at least 2: answers are compared with each other"
        )
        require(self.temperature > 0, "--temperature must be above 0: greedy answers are all equal")
        for name in ("comparisons", "max_new_tokens", "chunk", "max_batch", "workers"):
            require(getattr(self, name) > 0, f"--{name} must be at least 1, got {getattr(self, name)}")


def make_pairs(config: Config) -> Counter:
    """Write --out, or the rest of it. Returns how many prompts gave a pair, and why the others did not."""
    folder = resolve_folder(config.model)
    tokenizer, judge = load_tokenizer(folder), make_judge(config.judge, config.judge_model)
    chat_format = chat_format_of(tokenizer.chat_template)
    prompts = read_prompts(config.prompts, config.count, config.seed, chat_format == "moss")
    run = identity(config, folder, prompts)
    path = file_of(config)
    counts = written(path, run, len(prompts))
    done = counts.total()
    if done:
        print(f"{path}: {done} of {len(prompts)} prompts done", flush=True)
    on_gpu = torch.cuda.is_available() and config.device != "cpu"
    model = load_pretrained(folder, torch.bfloat16 if on_gpu else torch.float32, "cuda" if on_gpu else "cpu")
    pack_weights(model)
    tokens, seconds = 0, 0.0
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        # A chunk that was interrupted is sampled again as a whole: the same numbers come out.
        for start in range(done - done % config.chunk, len(prompts), config.chunk):
            chunk = prompts[start : start + config.chunk]
            begun = time.monotonic()
            talks = [prompt.messages for prompt in chunk for _ in range(config.num_samples)]
            made = replies(
                model,
                tokenizer,
                talks,
                chat_format,
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
                top_p=config.top_p,
                max_batch=config.max_batch,
                seed=random.Random(f"{config.seed}/{start}").getrandbits(60),
            )
            seconds += time.monotonic() - begun
            parts = [reply[key] for reply in made for key in WRITTEN if key in reply]
            tokens += sum(len(tokenizer.encode(part)) + 1 for part in parts)
            groups = [made[i : i + config.num_samples] for i in range(0, len(made), config.num_samples)]
            work = [(n, *one) for n, one in enumerate(zip(chunk, groups, strict=True), start) if n >= done]
            for record in judged(work, judge, config):
                counts["pairs" if record["chosen"] else record["why"]] += 1
                file.write(json.dumps(record | {"run": run}, ensure_ascii=False) + "\n")
                file.flush()
            os.fsync(file.fileno())
            print(f"{start + len(chunk)} of {len(prompts)} prompts, {counts['pairs']} pairs", flush=True)
    if seconds:
        print(f"{tokens / seconds:,.0f} tokens a second of answers")
    return counts


def file_of(config: Config) -> Path:
    return Path(config.out) if config.out.endswith(".jsonl") else Path(config.out, "pairs.jsonl")


def judged(
    work: list[tuple[int, Prompt, list[Message]]], judge: Judge, config: Config
) -> Iterator[dict[str, Any]]:
    """A record for each prompt, in order. An endpoint is asked about several at a time."""

    def one(item: tuple[int, Prompt, list[Message]]) -> dict[str, Any]:
        return compare(*item, judge, config)

    if config.judge.startswith("http"):
        with ThreadPoolExecutor(config.workers) as pool:
            try:
                yield from pool.map(one, work)
            finally:
                pool.shutdown(cancel_futures=True)  # after a failure, do not ask about the rest first
    else:
        yield from map(one, work)


def compare(
    number: int, prompt: Prompt, responses: list[Message], judge: Judge, config: Config
) -> dict[str, Any]:
    """Compare a prompt's answers, two at a time in a drawn order, until two are told apart."""
    whole = [r for r in responses if r["finish_reason"] == "stop" and r["content"].strip()]
    couples = [(a, b) for a, b in itertools.combinations(whole, 2) if a["content"] != b["content"]]
    random.Random(f"{config.seed}/{number}").shuffle(couples)
    why = "equal answers" if len(whole) > 1 else "answers cut off or empty"
    verdicts: list[list[int | None]] = []
    sides: dict[str, Any] = {"chosen": None, "rejected": None}
    for a, b in couples[: config.comparisons]:
        verdict, said = in_both_orders(judge, prompt, a["content"], b["content"])
        verdicts.append(said)
        if verdict:
            better, worse = (a, b) if verdict > 0 else (b, a)
            sides = {"chosen": talk(prompt, better), "rejected": talk(prompt, worse)}
            break
    if verdicts and not sides["chosen"]:
        usable = any(None not in said for said in verdicts)
        why = "no two answers told apart in both orders" if usable else "judge said nothing usable"
    scored = responses
    if isinstance(judge, RuleJudge):
        scored = [reply | {"score": judge.score(prompt, reply["content"])} for reply in responses]
    return {
        "number": number,
        **prompt.record(),
        **sides,
        **({} if sides["chosen"] else {"why": why}),
        "responses": [{key: value for key, value in reply.items() if key != "role"} for reply in scored],
        "judge": config.judge,
        "verdicts": verdicts,
        "seed": config.seed,
    }


def talk(prompt: Prompt, reply: Message) -> list[Message]:
    """The prompt and an answer as a conversation to learn from."""
    return [*prompt.messages, {key: value for key, value in reply.items() if key != "finish_reason"}]


def identity(config: Config, folder: Path, prompts: list[Prompt]) -> str:
    """A hash of everything that a line depends on."""
    settings = {key: value for key, value in asdict(config).items() if key not in UNIMPORTANT}
    asked = json.dumps([prompt.record() for prompt in prompts], sort_keys=True)
    return sha256(f"{sorted(settings.items())}{weights_hash(folder)}{asked}".encode()).hexdigest()[:16]


WRITTEN = ("thoughts", "commands", "content")  # what a model writes of a reply
UNIMPORTANT = (
    "model",
    "out",
    "prompts",
    "max_batch",
    "workers",
    "device",
)  # the contents count, not the names


def weights_hash(folder: Path) -> str:
    """A hash of a model's weights and configuration."""
    digest = sha256()
    for path in [folder / "config.json", *weight_files(folder)]:
        with open(path, "rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()[:16]


def written(path: Path, run: str, expected: int) -> Counter:
    """What --out holds already, by outcome; half a line at its end, left by a kill, is cut off."""
    counts: Counter = Counter()
    if not path.exists():
        return counts
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        print(f"{path}: half a line at the end is cut off and made again", flush=True)
        os.truncate(path, whole)
    for number, line in enumerate(content[:whole].splitlines()):
        try:
            record = json.loads(line)
            same, right = record["run"] == run, record["number"] == number < expected
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path}:{number + 1}: not a line of this program; choose another --out"
            ) from None
        if not same:
            raise UserError(
                f"{path}: made with another model, other prompts or other settings; choose another --out"
            )
        if not right:
            raise UserError(f"{path}:{number + 1}: out of order; choose another --out")
        counts["pairs" if record["chosen"] else record["why"]] += 1
    return counts


def start_and_pairs(config: C, run: Run) -> tuple[Path, PairData, C]:
    """The folder of the model to start from, and the pairs: those given, or both made in the run folder. And
    the options with the number of steps that so many pairs make."""
    folder, files = config.init_from, config.data
    if not folder:
        folder, files = make_both(config, run)
    path = resolve_folder(folder)
    data = load_pairs(files, load_tokenizer(path), config, run)
    return path, data, config.planned(len(data.train))


def make_both(config: PairConfig, run: Run) -> tuple[str, tuple[str, ...]]:
    """A small model that sorts digits now and then, and its answers, compared by rule."""
    start, file = run.folder / "start", run.folder / "pairs.jsonl"
    problems = Problems(("sorting",), config.seed)

    def demonstration(number: int) -> list[Message]:
        problem = problems.train(number)
        answer = {"role": "assistant", **problem.demonstration}
        return [{"role": "user", "content": problem.prompt}, answer]

    if not start.exists():
        teach(start, demonstration, config, run)
    if run.main:
        counts = make_pairs(
            Config(
                model=str(start),
                prompts="sorting",
                out=str(file),
                count=config.made_prompts,
                num_samples=config.num_samples,
                max_new_tokens=config.max_new_tokens,
                seed=config.seed,
                chunk=1000,
                device="cpu",
            )
        )
        run.say(f"answers of that model, compared: {report(counts)}")
    run.barrier()
    return str(start), (str(file),)


def report(counts: Counter) -> str:
    return ", ".join(f"{count} {what}" for what, count in counts.items())


def main() -> None:
    config = parse(Config, {"default": {}}, about=__doc__)
    require(bool(config.model), "--model FOLDER: the model that answers")
    counts = make_pairs(config)
    path = file_of(config)
    if path.name not in config.out:
        write_json(path.with_name("summary.json"), {"prompts": counts.total(), **counts})
    print(f"{path}: {report(counts)}")
    print(f"next: python dpo.py --init_from {config.model} --data {path}")


if __name__ == "__main__":
    run_main(main)
