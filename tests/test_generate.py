"""Generation: exact against forwards without a cache, and the distribution it samples from."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import core.generate
from core.checkpoint import load_pretrained, save_pretrained
from core.config import UserError
from core.decode import Decoder, Memory, PackedLinear, join_weights, pack_weights
from core.generate import Batch, Completion, Sampling, distribution, generate, stream, uniforms
from core.parallel import shard, unsharded
from data.tokenizer import load_tokenizer
from model import Config, Transformer
from tests.conftest import ROOT, run_processes

VOCAB = 61
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "layers": 2,
    "dim": 32,
    "heads": 4,
    "head_dim": 8,
    "ffn_dim": 48,
}
MODELS = {
    "window": Config(**SHAPE, kv_heads=2, max_seq_len=64, sliding_window=7, init_std=0.3),
    "llama": Config("llama", **SHAPE, kv_heads=1, max_seq_len=128, tied=True, init_std=0.3),
    "codegen": Config(
        "codegen",
        **SHAPE,
        kv_heads=4,
        max_seq_len=128,
        rotary_dim=4,
        norm="layer",
        parallel_block=True,
        mlp="gelu",
        head_bias=True,
        init_std=0.3,
    ),
}


def prompts_of(count: int, longest: int) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(VOCAB) for _ in range(draw.randint(1, longest))] for _ in range(count)]


@torch.no_grad()
def without_cache(model: Transformer, prompt: list[int], new: int, stop_ids: tuple[int, ...]) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + new:
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        if tokens[-1] in stop_ids:
            break
    return tokens[len(prompt) :]


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_that_of_the_model_without_a_cache(name: str, joined: bool) -> None:
    """Two hundred ragged prompts through seven slots; answers end at three stop ids or after 12 tokens."""
    model = Transformer(MODELS[name], seed=1)
    prompts = prompts_of(200 if joined else 40, 30)
    expected = [without_cache(model, prompt, 12, (3, 4, 5)) for prompt in prompts]
    done = generate(
        join_weights(model) if joined else model, prompts, 12, temperature=0, stop_ids=(3, 4, 5), max_batch=7
    )
    assert [samples[0].tokens for samples in done] == expected
    assert len({len(tokens) for tokens in expected}) > 3, "the answers should be ragged"
    for (sample,), tokens in zip(done, expected, strict=True):
        assert sample.finish_reason == ("stop" if tokens[-1] in (3, 4, 5) else "length")


@pytest.mark.parametrize("name", MODELS)
def test_logprobs_are_those_of_a_fresh_forward(name: str) -> None:
    model, prompts = Transformer(MODELS[name], seed=1), prompts_of(10, 20)
    done = generate(model, prompts, 15, num_samples=4, temperature=0.7, top_k=20, stop_ids=(3,), max_batch=6)
    for prompt, samples in zip(prompts, done, strict=True):
        for sample in samples:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + sample.tokens]))[0, len(prompt) - 1 : -1]
            expected = distribution(logits, Sampling(temperature=0.7, top_k=20))
            expected = expected.gather(1, torch.tensor(sample.tokens)[:, None]).squeeze(1)
            assert (expected - torch.tensor(sample.logprobs)).abs().max() < 1e-4


def test_a_window_rolls_past_the_context() -> None:
    """Twice max_seq_len tokens, with a cache of seven places, equal to a forward over everything."""
    model = Transformer(MODELS["window"], seed=1)
    (sample,) = generate(model, [[1, 2, 3]], 128, temperature=0)[0]
    assert sample.finish_reason == "length"
    assert sample.tokens == without_cache(model, [1, 2, 3], 128, ())


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.3}, {"top_k": 9, "top_p": 0.8}],
)
def test_frequencies_match_the_distribution(options: dict[str, Any]) -> None:
    """Chi-square over 4,000 first and second tokens; 5 standard deviations of the statistic are allowed."""
    model = Transformer(MODELS["llama"], seed=1)
    samples = generate(model, [[5, 6]], 2, num_samples=4000, max_batch=512, **options)[0]
    with torch.no_grad():
        firsts = distribution(model(torch.tensor([[5, 6]]))[0, -1:], Sampling(**options))[0].exp()
        seconds = distribution(
            model(torch.tensor([[5, 6, i] for i in range(VOCAB)]))[:, -1], Sampling(**options)
        ).exp()
    for place, probability in ((0, firsts), (1, firsts @ seconds)):
        counts = torch.bincount(torch.tensor([s.tokens[place] for s in samples]), minlength=VOCAB)
        assert counts[probability == 0].sum() == 0
        expected = 4000 * probability.double()
        often = expected >= 5
        statistic = ((counts - expected).square() / expected)[often].sum().item()
        freedom = int(often.sum()) - 1
        assert freedom < 1 or statistic < freedom + 5 * math.sqrt(2 * freedom)


def test_results_do_not_depend_on_the_batch() -> None:
    model, prompts = Transformer(MODELS["llama"], seed=1), prompts_of(9, 20)
    options: dict[str, Any] = {"max_new_tokens": 20, "num_samples": 3, "stop_ids": (3,), "seed": 5}
    runs = [generate(model, prompts, max_batch=size, **options) for size in (1, 4, 64)]
    tokens = [[[sample.tokens for sample in samples] for samples in run] for run in runs]
    assert tokens[0] == tokens[1] == tokens[2]
    assert len({tuple(sample) for sample in tokens[0][0]}) == 3, "samples of one prompt should differ"
    assert generate(model, prompts, **(options | {"seed": 6})) != runs[2]


def test_a_prompt_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = Transformer(MODELS["llama"]), []
    forward = model.hidden_states
    monkeypatch.setattr(
        model, "hidden_states", lambda tokens, **more: read.append(tokens) or forward(tokens, **more)
    )
    generate(model, [[1, 2], [3, 4], [5, 6]], 4, num_samples=5, max_batch=4)
    assert sum(tokens.shape[0] for tokens in read) == 3


@pytest.mark.parametrize("name", MODELS)
def test_a_growing_conversation_is_read_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns of four tokens and answers of five: with a memory the same answers, and each token read once,
    but where a window's rolling cache has overwritten some."""
    model, lengths = Transformer(MODELS[name], seed=1), []
    forward = model.hidden_states

    def count(tokens: Tensor, **more: Any) -> Tensor:
        lengths.append(tokens.shape[1])
        return forward(tokens, **more)

    monkeypatch.setattr(model, "hidden_states", count)
    memory, talk, cold = Memory(), [], []
    for turn in range(4):
        talk += [turn, 7, 8, 9]
        asked = model, talk, ByteTokenizer(), Sampling(), 5, turn
        (*_, (_, expected)) = stream(*asked)
        (*_, (_, made)) = stream(*asked, memory=memory)
        assert made.tokens == expected.tokens
        cold.append(len(talk))
        talk = talk + made.tokens
    first, *later = lengths[1::2]
    assert lengths[::2] == cold and first == 4
    assert later == (cold[1:] if name == "window" else [5, 5, 5])  # a turn, and the answer's last token
    (*_, (_, other)) = stream(model, [1, 2, 3], ByteTokenizer(), Sampling(), 5, memory=memory)
    assert other.tokens == generate(model, [[1, 2, 3]], 5)[0][0].tokens, "another conversation"
    held = stream(model, [1, 2, 3], ByteTokenizer(), Sampling(), 5, memory=memory)
    next(held), next(held)
    held.close()
    assert len(memory.tokens) == 4, "an answer that is stopped is remembered as far as it was read"


def test_distribution_is_that_of_transformers() -> None:
    torch.manual_seed(0)
    logits, history = 3 * torch.randn(20, 200), torch.randint(0, 200, (20, 30))
    seen = torch.zeros(20, 200, dtype=torch.bool).scatter_(1, history, True)
    processors = transformers.generation.logits_process
    for sampling, chain in (
        (Sampling(0.7), [processors.TemperatureLogitsWarper(0.7)]),
        (Sampling(top_k=13), [processors.TopKLogitsWarper(13)]),
        (Sampling(top_p=0.8), [processors.TopPLogitsWarper(0.8)]),
        (Sampling(min_p=0.1), [processors.MinPLogitsWarper(0.1)]),
        (Sampling(repetition_penalty=1.3), [processors.RepetitionPenaltyLogitsProcessor(1.3)]),
        (
            Sampling(0.7, 0.8, 40, repetition_penalty=1.02),  # MOSS's own settings
            [
                processors.RepetitionPenaltyLogitsProcessor(1.02),
                processors.TemperatureLogitsWarper(0.7),
                processors.TopKLogitsWarper(40),
                processors.TopPLogitsWarper(0.8),
            ],
        ),
    ):
        expected = logits.clone()
        for processor in chain:
            expected = processor(history, expected)
        ours = distribution(logits, sampling, seen if sampling.repetition_penalty != 1 else None)
        assert torch.allclose(ours.exp(), expected.softmax(-1), atol=1e-6)


def test_repetition_penalty_sees_prompt_and_answer() -> None:
    model = Transformer(MODELS["llama"], seed=1)
    (sample,) = generate(model, [[7, 8]], 20, temperature=0, repetition_penalty=1e6)[0]
    assert len(set(sample.tokens) | {7, 8}) == 22, "with an overwhelming penalty nothing comes twice"


def test_uniforms_are_splitmix64() -> None:
    mask = 2**64 - 1

    def reference(state: int, count: int) -> list[float]:
        found = []
        for _ in range(count):
            state = (state + 0x9E3779B97F4A7C15) & mask
            z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
            z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
            found.append((((z ^ (z >> 31)) >> 11) + 0.5) / 2**53)
        return found

    start = int.from_bytes(core.generate.hashlib.blake2b(b"3/1/4", digest_size=8).digest(), "little")
    assert uniforms(3, [(1, 4)], 50)[0].tolist() == reference(start, 50)
    many = uniforms(0, [(p, s) for p in range(10) for s in range(10)], 64).flatten()
    assert 0 < many.min() and many.max() < 1 and len(many.unique()) == len(many)
    assert abs(many.mean() - 0.5) < 5 * math.sqrt(1 / 12 / len(many))


@pytest.mark.parametrize("fixed_rows", [False, True])
def test_steps_ahead_of_the_bookkeeping(fixed_rows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: four steps between looks at what was drawn; and a power of two of rows, as recorded in a
    graph."""
    model, prompts = Transformer(MODELS["window"], seed=1), prompts_of(20, 20)
    expected = generate(model, prompts, 15, num_samples=2, stop_ids=(3, 4))
    replayed = []

    def replay(decoder: Decoder, tokens: Tensor, positions: Tensor) -> Tensor:
        replayed.append(len(tokens))
        return decoder(tokens, positions, decoder.cache.capacity)

    monkeypatch.setattr(Decoder, "replay", replay)
    batch = Batch(model, prompts, Sampling(stop_ids=(3, 4)), 15, 2, 0, 6, None, None)
    batch.stride, batch.cuda_graph = 4, fixed_rows
    found = {(slot.prompt, slot.sample): slot.completion.tokens for slot in batch.run()}
    assert found == {(p, s): expected[p][s].tokens for p in range(20) for s in range(2)}
    assert bool(replayed) == fixed_rows and set(replayed) <= {1, 2, 4, 6}


INTERPRETED = """
import json
from core.generate import generate
from tests.test_generate import MODELS
from model import Transformer
done = generate(Transformer(MODELS["llama"], seed=1), [[1, 2, 3], [4]], 4, temperature=0)
print(json.dumps([samples[0].tokens for samples in done]))
"""


def test_the_decode_kernel_gives_the_same_tokens() -> None:
    """The Triton kernels that a GPU would run, in Triton's interpreter."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", INTERPRETED]
    done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    expected = generate(Transformer(MODELS["llama"], seed=1), [[1, 2, 3], [4]], 4, temperature=0)
    assert found == [samples[0].tokens for samples in expected]


class ByteTokenizer:
    """Ids are bytes; 256 ends."""

    special_tokens, vocab_size = {"<end>": 256}, 257

    def decode_bytes(self, ids: list[int]) -> bytes:
        return b"".join(b"<end>" if i == 256 else bytes([i]) for i in ids)


def scripted(monkeypatch: pytest.MonkeyPatch, script: list[int]) -> Transformer:
    """A model that says `script`, whatever it is asked."""

    def say(batch: Batch, logits: Tensor, rows: Any) -> tuple[Tensor, Tensor]:
        tokens = torch.tensor([script[step] for step in batch.steps[rows].tolist()])
        batch.tokens[rows] = tokens
        return tokens, torch.zeros(len(tokens))

    monkeypatch.setattr(Batch, "draw", say)
    return Transformer(Config(**{**SHAPE, "vocab_size": 300}, kv_heads=1, max_seq_len=512))


def test_streaming_by_whole_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "naïve 你好 👩‍🚀 done"
    model = scripted(monkeypatch, [*text.encode(), 256])
    pieces = [piece for piece, _ in stream(model, [1], ByteTokenizer(), Sampling(stop_ids=(256,)))]
    assert "".join(pieces) == text and "�" not in "".join(pieces)
    assert len(pieces) == len(text.encode()) + 1, "one piece a token, some of them empty"


def test_streaming_holds_back_what_may_be_a_stop_string(monkeypatch: pytest.MonkeyPatch) -> None:
    model = scripted(monkeypatch, list(b"1, 2\n\nUsx\n\nUser: and more"))
    sampling = Sampling(stop_strings=("\n\nUser:", "###"))
    pieces, completions = zip(*stream(model, [1], ByteTokenizer(), sampling), strict=True)
    assert "".join(pieces) == "1, 2\n\nUsx"
    assert completions[-1].finish_reason == "stop" and bytes(completions[-1].tokens).endswith(b"User:")


def test_broken_utf8_at_the_end_is_shown_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    model = scripted(monkeypatch, list("好".encode())[:2] + [256])
    assert "".join(p for p, _ in stream(model, [1], ByteTokenizer(), Sampling(stop_ids=(256,)))) == "�"


def test_stop_strings_in_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = scripted(monkeypatch, list(b"one two three four"))
    (sample,) = generate(model, [[1]], 15, stop_strings=("o th",), tokenizer=ByteTokenizer())[0]
    assert bytes(sample.tokens) == b"one two th" and sample.finish_reason == "stop"
    (sample,) = generate(model, [[1]], 15, stop_strings=("absent",), tokenizer=ByteTokenizer())[0]
    assert len(sample.tokens) == 15 and sample.finish_reason == "length"


def test_padding_rows_of_the_vocabulary_are_never_drawn() -> None:
    model = Transformer(Config(**{**SHAPE, "vocab_size": 300}, kv_heads=1, init_std=0.01))
    drawn = [
        t for s in generate(model, [[1]], 40, num_samples=50, tokenizer=ByteTokenizer())[0] for t in s.tokens
    ]
    assert max(drawn) <= 256 and len(set(drawn)) > 200


def test_context_limit() -> None:
    model = Transformer(MODELS["llama"], seed=1)
    (sample,) = generate(model, [[1] * 120], 50)[0]
    assert len(sample.tokens) == 8 and sample.finish_reason == "context"
    with pytest.raises(UserError, match="prompt 1: 128 tokens fill the model's context of 128; shorten it"):
        generate(model, [[1], [1] * 128], 5)


@pytest.mark.parametrize(
    ("prompts", "options", "said"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[VOCAB]], {}, "outside 0..60"),
        ([[-1]], {}, "outside 0..60"),
        ([[1]], {"temperature": -1.0}, "temperature must be"),
        ([[1]], {"top_p": 0.0}, "top_p must be"),
        ([[1]], {"stop_strings": ["x"]}, "need the tokenizer"),
    ],
)
def test_bad_requests(prompts: list[list[int]], options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        generate(Transformer(MODELS["llama"]), prompts, 5, **options)


def test_nothing_to_do() -> None:
    model = Transformer(MODELS["llama"])
    assert generate(model, []) == []
    assert generate(model, [[1]], max_new_tokens=0) == [[Completion([], [], "length")]]


def test_joined_weights_follow_updates() -> None:
    """Names, shapes and values stay, and a later change of the parameters is seen by the next generation."""
    model = Transformer(MODELS["llama"], seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    join_weights(model)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    expected = [without_cache(model, prompt, 8, ()) for prompt in prompts_of(5, 9)]
    assert [s[0].tokens for s in generate(model, prompts_of(5, 9), 8, temperature=0)] == expected


@pytest.mark.parametrize("name", MODELS)
def test_packed_weights_give_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices packed for batches: same greedy tokens, and log-probabilities of a forward with plain ones."""
    monkeypatch.setattr("core.decode.WORTH_PACKING", 1)
    plain, packed = Transformer(MODELS[name], seed=1), pack_weights(Transformer(MODELS[name], seed=1))
    assert isinstance(packed.head, PackedLinear) and isinstance(packed.layers[0].mlp.down, PackedLinear)
    prompts = prompts_of(30, 30)
    done = generate(packed, prompts, 12, temperature=0, stop_ids=(3, 4, 5), max_batch=7)
    assert [s[0].tokens for s in done] == [without_cache(plain, p, 12, (3, 4, 5)) for p in prompts]
    for prompt, (sample,) in zip(prompts, done, strict=True):
        with torch.no_grad():
            logits = plain(torch.tensor([prompt + sample.tokens]))[0, len(prompt) - 1 : -1]
        best = logits.log_softmax(-1).max(-1).values
        assert (best - torch.tensor(sample.logprobs)).abs().max() < 1e-4


def test_small_models_are_joined_not_packed() -> None:
    assert type(pack_weights(Transformer(MODELS["llama"])).head) is torch.nn.Linear


def generate_sharded(name: str) -> tuple[list[list[int]], str]:
    """In a group of processes: each generates a different amount from one sharded model."""
    model = Transformer(MODELS[name], seed=1)
    run = SimpleNamespace(world_size=2, device=torch.device("cpu"), dtype=torch.float32)
    shard(model, list(model.layers), run, methods=())
    count = 3 + 4 * torch.distributed.get_rank()
    with unsharded(model):
        done = generate(model, prompts_of(count, 9), 8, temperature=0)
    try:
        generate(model, [[1]], 2)
        error = ""
    except RuntimeError as caught:
        error = str(caught)
    return [samples[0].tokens for samples in done], error


def test_sharded_models_generate_when_gathered(tmp_path: Path) -> None:
    model = Transformer(MODELS["llama"], seed=1)
    for tokens, error in run_processes(generate_sharded, 2, tmp_path, "llama"):
        assert tokens == [without_cache(model, p, 8, ()) for p in prompts_of(len(tokens), 9)]
        assert "core.parallel.unsharded" in error


def test_real_story(real_data: Path, tmp_path: Path) -> None:
    """Greedy from BOS, token for token as transformers; also with the weights laid out otherwise, and after
    save and load."""
    folder = real_data / "stories260k"
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = reference.generate(torch.tensor([[1]]), max_new_tokens=200, do_sample=False)[0, 1:].tolist()
    save_pretrained(load_pretrained(folder), tmp_path, load_tokenizer(folder))
    for model in (load_pretrained(folder), join_weights(load_pretrained(folder)), load_pretrained(tmp_path)):
        told = generate(model, [[1]], 200, temperature=0)[0][0].tokens
        assert told[: len(expected)] == expected
    assert (
        load_tokenizer(tmp_path)
        .decode(told)
        .startswith("Once upon a time, there was a little girl named Lily.")
    )
