"""Shared prefixes change nothing: every sum equals that of reading context and continuation whole."""

import random

import pytest
import torch

from core.likelihood import FAMILY, Request, families, make_request, rolling_requests, score
from model import PATCH, VLM, Config, Transformer

SHAPE = dict(vocab_size=97, layers=2, dim=32, heads=4, kv_heads=2, head_dim=8, ffn_dim=48, max_seq_len=128)
MODELS = {
    "mistral": Config(**SHAPE, init_std=0.2),
    "window": Config(**SHAPE, init_std=0.2, sliding_window=9),
    "codegen": Config(
        **SHAPE | {"kv_heads": 4},
        architecture="codegen",
        rotary_dim=4,
        norm="layer",
        parallel_block=True,
        mlp="gelu",
        head_bias=True,
        init_std=0.2,
    ),
}


def whole(model: Transformer, request: Request, **inputs: torch.Tensor) -> float:
    """The definition: one forward over all inputs, in float64 log-softmax."""
    with torch.no_grad():
        logprobs = model(torch.tensor([request.inputs]), **inputs)[0].double().log_softmax(-1)
    offset = len(request.inputs) - len(request.targets)
    return sum(logprobs[offset + i, target].item() for i, target in enumerate(request.targets))


def draw(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(97) for _ in range(count)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch_tokens", [1, 150, 100_000])
def test_sums_are_those_of_whole_reads(name: str, batch_tokens: int) -> None:
    model, rng = Transformer(MODELS[name], seed=1), random.Random(name)
    examples = draw(rng, FAMILY + 7)
    questions = []
    for number in range(14):
        context = (examples if number % 2 else []) + draw(rng, rng.randint(1, 30))
        stem = draw(rng, rng.randint(0, 2))  # options may begin alike, or be of one token
        options = [stem + draw(rng, rng.randint(1, 5)) for _ in range(4)]
        questions.append([make_request(context, option, longest=60) for option in options])
    questions.append([make_request(draw(rng, n), draw(rng, 3), 60) for n in (1, 2)])  # nothing in common
    found = score(model, questions, batch_tokens)
    expected = [[whole(model, request) for request in question] for question in questions]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=2e-4)


def test_examples_in_common_are_read_once() -> None:
    rng = random.Random(0)
    examples = draw(rng, 50)
    questions = [
        [(4 * q + i, make_request(examples + [q, q + 1], draw(rng, 3), 100)) for i in range(4)]
        for q in range(6)
    ]
    (family,) = families(questions)
    assert family.shared == examples and len(family.questions) == 6
    model, read = Transformer(MODELS["mistral"]), []
    model.embed.register_forward_hook(lambda module, inputs, output: read.append(inputs[0].numel()))
    score(model, [[request for _, request in question] for question in questions])
    # The examples, six questions of two tokens, 24 options of which all but the last token is read.
    assert sum(read) == 50 + 6 * 2 + 24 * 2


def test_a_context_that_is_too_long_keeps_its_end() -> None:
    request = make_request(list(range(50)), [60, 61, 62], longest=10)
    assert request == Request([42, 43, 44, 45, 46, 47, 48, 49, 60, 61][-10:], [60, 61, 62])
    assert make_request([1], list(range(30)), longest=10).targets == list(range(20, 30))


@pytest.mark.parametrize("length", [1, 9, 10, 11, 25, 40])
def test_windows_predict_every_token_once(length: int) -> None:
    tokens = list(range(100, 100 + length))
    requests = rolling_requests(tokens, 7, longest=10)
    assert [target for request in requests for target in request.targets] == tokens
    history = [7, *tokens]
    end = 0
    for request in requests:
        end += len(request.targets)
        assert len(request.inputs) <= 10
        assert request.inputs == history[end - len(request.inputs) : end]  # the tokens just before


def test_no_questions() -> None:
    assert score(Transformer(MODELS["mistral"]), []) == []


def test_pictures_are_told_apart() -> None:
    """Two questions with the same tokens and different pictures."""
    model, rng = VLM(MODELS["mistral"], vision_dim=12, seed=2), random.Random(1)
    features = [torch.randn(1, 5, 12, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    prompt = [1, *[PATCH] * 5, 2, 3]
    questions = [[make_request(prompt, draw(rng, n), 60) for n in (1, 3)] for _ in features]
    found = score(model, questions, 64, features)
    for question, seen, sums in zip(questions, features, found, strict=True):
        assert sums == pytest.approx([whole(model, one, features=seen) for one in question], abs=2e-4)
    assert abs(found[0][0] - found[1][0]) > 1e-3
