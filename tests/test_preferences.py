"""DPO and the preference model: oracles, invariances, the cached reference, resume, tags, bad input."""

import json
import math
import shutil
import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

import dpo
import preference
import sft
from core.checkpoint import load_pretrained, read_config, save_pretrained
from core.config import UsageError, UserError
from data.chat import chat_template
from data.pair_batches import PairItem, pair_batches, read_pairs, render_answer
from data.pairs import weights_hash
from data.prompts import Prompt
from data.readers import read_conversations
from data.sessions import Conversation
from data.tokenizer import load_tokenizer, train_tokenizer
from model import Config as Shape
from model import Transformer
from tests.conftest import run_processes

FAST = "--device cpu --seq_len 48 --batch_size 6 --micro_batch_size 2 --epochs 0 --steps 6 --lr 1e-2".split()
FAST += "--eval_every 2 --save_every 2 --log_every 1 --schedule cosine".split()
FAST += "--max_new_tokens 4 --eval_samples 1 --val_fraction 0.2".split()

LONG = "--save_every 0 --eval_every 0 --steps".split()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """--init_from and --data: a small random model and 30 pairs, in two languages and of unlike lengths."""
    folder = tmp_path_factory.mktemp("made")
    rng = np.random.default_rng(0)
    rows = []
    for number in range(30):
        prompt = "sort " + "".join(map(str, rng.integers(0, 10, 4))) if number % 3 else f"你好 {number}"
        better, worse = ("".join(map(str, rng.integers(0, 10, rng.integers(2, 9)))) for _ in range(2))
        rows.append(
            {"prompt": prompt, "chosen": better, "rejected": worse + "x", "category": f"c{number % 2}"}
        )
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_model(folder / "model", seed=1)
    return ["--init_from", str(folder / "model"), "--data", str(folder / "pairs.jsonl")]


def save_model(folder: Path, seed: int) -> None:
    tokenizer = train_tokenizer(["<|user|>\nsort 7391\n<|assistant|>\n1379"] * 20, 290)
    tokenizer.chat_template = chat_template(tokenizer, "tulu")
    shape = Shape(
        vocab_size=290, layers=2, dim=32, heads=2, kv_heads=1, head_dim=16, ffn_dim=48, init_std=0.2
    )
    save_pretrained(Transformer(shape, seed), folder, tokenizer)


def run(stage: str, out: Path, *words: str) -> dict[int, dict]:
    """dpo.py or preference.py in this process; its metrics by step."""
    before, sys.argv = sys.argv, [f"{stage}.py", *FAST, "--out", str(out), *words]
    try:
        {"dpo": dpo, "preference": preference}[stage].main()
    finally:
        sys.argv = before
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record for record in records if "loss" in record}


def losses(stage: str, out: Path, *words: str) -> list[float]:
    return [record["loss"] for record in run(stage, out, *words).values()]


# DPO's loss


@pytest.mark.parametrize("loss", ["sigmoid", "sigmoid_norm"])
def test_loss_and_gradient_are_trls(loss: str) -> None:
    trainer = pytest.importorskip("trl.trainer.dpo_trainer", reason="trl is not installed").DPOTrainer
    torch.manual_seed(0)
    for beta in (0.1, 5.0):
        logprobs = (-2 * torch.rand(8, 12, dtype=torch.double)).requires_grad_()  # 4 chosen, 4 rejected
        mask = torch.arange(13) < torch.randint(4, 13, (8, 1))
        mask[:, :3] = False  # the prompt
        reference = ((logprobs + 0.3 * torch.randn(8, 12)) * mask[:, 1:]).sum(1).detach()
        stub = SimpleNamespace(
            model=SimpleNamespace(training=True),
            accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x),
            aux_loss_enabled=False,
            ld_alpha=None,
            precompute_ref_logps=True,
            f_divergence_type="reverse_kl",
            loss_types=[loss],
            loss_weights=[1.0],
            beta=beta,
            label_smoothing=0.0,
            use_weighting=False,
            _metrics=defaultdict(lambda: defaultdict(list)),
            _total_train_tokens=0,
            _tp_size=1,
        )
        zeros = torch.zeros(8, 12, dtype=torch.double)
        outputs = SimpleNamespace(
            log_probs=logprobs * mask[:, 1:], entropy=zeros, mean_logits=zeros, is_top1=zeros > 0
        )
        inputs = {
            "input_ids": torch.ones(8, 13, dtype=torch.long),
            "attention_mask": torch.ones(8, 13),
            "completion_mask": mask.long(),
            "ref_chosen_logps": reference[:4],
            "ref_rejected_logps": reference[4:],
        }
        theirs = trainer._compute_loss(stub, lambda outputs=outputs, **_: outputs, inputs, False)
        (expected,) = torch.autograd.grad(theirs, logprobs)
        sums = (logprobs * mask[:, 1:]).sum(1).view(2, 4).T
        lengths = mask[:, 1:].sum(1).view(2, 4).T
        config = dpo.Config(warm_steps=1, loss=loss, beta=beta)
        each, values = dpo.dpo_loss(sums, reference.view(2, 4).T, lengths, config)
        (gradient,) = torch.autograd.grad(each.mean(), logprobs)
        assert each.mean().item() == pytest.approx(theirs.item(), abs=1e-6)
        assert (gradient - expected).abs().max() < 1e-6
        metrics = stub._metrics["train"]
        figures = dict(zip(dpo.NAMES, (values / 4).tolist(), strict=True))
        assert figures["summed_accuracy"] == pytest.approx(metrics["rewards/accuracies"][0])
        assert beta * figures["summed_margin"] == pytest.approx(metrics["rewards/margins"][0])


def test_loss_by_hand() -> None:
    """Two pairs with known numbers; the chosen answer's own loss on top."""
    logprobs = torch.tensor([[-2.0, -6.0], [-9.0, -1.0]], dtype=torch.double)
    reference = torch.tensor([[-3.0, -4.0], [-9.0, -1.0]], dtype=torch.double)
    lengths = torch.tensor([[2, 4], [3, 1]])
    for loss, margin in (("sigmoid", 1.0 + 2.0), ("sigmoid_norm", 1.0 / 2 + 2.0 / 4)):
        config = dpo.Config(warm_steps=1, loss=loss, beta=2.0, nll_coef=0.5)
        each, values = dpo.dpo_loss(logprobs, reference, lengths, config)
        expected = [math.log(1 + math.exp(-2 * margin)) + 0.5 * 2 / 2, math.log(2) + 0.5 * 9 / 3]
        assert each.tolist() == pytest.approx(expected, abs=1e-12)
        figures = dict(zip(dpo.NAMES, values.tolist(), strict=True))
        assert figures["margin"] == pytest.approx(margin) and figures["summed_margin"] == 3.0
        assert (
            figures["accuracy"] == 1.5 and figures["chosen_drift"] == 1.0 and figures["rejected_drift"] == -2
        )
        assert figures["chosen_length"] == 5 and figures["pairs"] == 2


def test_loss_at_the_start_is_ln_2(made: list[str], tmp_path: Path) -> None:
    for loss in ("sigmoid", "sigmoid_norm"):
        first = run("dpo", tmp_path / loss, *made, "--loss", loss, "--steps", "1")[1]
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert abs(first["margin"]) < 1e-5 and abs(first["chosen_drift"]) < 1e-5
        summary = json.loads((tmp_path / loss / "summary.json").read_text())
        assert summary["before"]["val_loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert summary["before"]["val_loss"] != summary["after"]["val_loss"]
        assert summary["pairs"] == {"read": 30, "pairs": 30}


@pytest.fixture(scope="module")
def world(made: list[str]) -> tuple[Transformer, list[PairItem]]:
    """The model in float64 and the rendered pairs."""
    tokenizer = load_tokenizer(made[1])
    pairs = read_pairs((made[3],)).pairs
    sides = [
        [render_answer([*p.prompt.messages, s], tokenizer, "tulu") for s in (p.chosen, p.rejected)]
        for p in pairs
    ]
    return load_pretrained(made[1], torch.float64), [PairItem(*pair) for pair in sides]


def separately(model: Transformer, pair: PairItem) -> Tensor:
    """log p of both answers of a pair, each in a forward of its own, from full logits."""
    found = []
    for side in (pair.chosen, pair.rejected):
        ids = torch.from_numpy(side.ids).long()
        logprobs = model(ids[None])[0].log_softmax(-1)
        found.append(sum(logprobs[t - 1, ids[t]] for t in range(1, len(ids)) if side.mask[t]))
    return torch.stack(found)


def test_packed_is_separate(world: tuple[Transformer, list[PairItem]]) -> None:
    """Values and gradients, however the pairs are packed."""
    model, pairs = world

    def gradient(total: Tensor) -> list[Tensor]:
        return torch.autograd.grad(total, list(model.parameters()))

    expected = torch.stack([separately(model, pair) for pair in pairs])
    weights = torch.randn(len(pairs), 2, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    wanted = gradient((expected * weights).sum())
    for seq_len, size in ((48, 1), (200, 4)):
        micros = pair_batches(pairs, seq_len, size)
        found = [(micro, dpo.answer_logprobs(model, micro)) for micro in micros]
        for micro, logprobs in found:
            assert (logprobs - expected[micro.numbers]).abs().max() < 1e-8
        got = gradient(sum((logprobs * weights[micro.numbers]).sum() for micro, logprobs in found))
        assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-8) for a, b in zip(got, wanted, strict=True))


def test_cached_reference_is_the_live_one(
    made: list[str], world: tuple[Transformer, list[PairItem]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Against separate forwards; a second run reads the file and gives the same curve."""
    cache = tmp_path / "reference.safetensors"
    words = [*made, "--reference", str(cache)]
    first = losses("dpo", tmp_path / "a", *words)
    assert "log-probabilities of the reference, once" in capsys.readouterr().out
    stamp = cache.stat().st_mtime_ns
    assert losses("dpo", tmp_path / "b", *words) == first and cache.stat().st_mtime_ns == stamp
    assert "log-probabilities of the reference, once" not in capsys.readouterr().out
    model, pairs = world
    with dpo.safe_open(cache, framework="pt") as file:
        cached = file.get_tensor("logprobs").tolist()
    live = [separately(model, pair).tolist() for pair in pairs]
    assert np.abs(np.sort(np.array(cached), 0) - np.sort(np.array(live), 0)).max() < 1e-4
    # What was made of something else is refused, and so is what is no cache at all.
    save_model(tmp_path / "other", seed=2)
    other = ["--init_from", str(tmp_path / "other"), *made[2:], "--reference", str(cache)]
    with pytest.raises(UserError, match="made with another model; name another --reference"):
        run("dpo", tmp_path / "c", *other)
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(Path(made[3]).read_text().splitlines(keepends=True)[:20]))
    with pytest.raises(UserError, match="made with another pairs"):
        run("dpo", tmp_path / "d", *made[:2], "--data", str(fewer), "--reference", str(cache))
    cache.write_bytes(cache.read_bytes()[:100])
    with pytest.raises(UserError, match="no log-probabilities of a reference"):
        run("dpo", tmp_path / "e", *words)


def test_weights_hash_changes_with_any_weight(tmp_path: Path) -> None:
    save_model(tmp_path / "a", 1)
    save_model(tmp_path / "b", 1)
    save_model(tmp_path / "c", 2)
    hashes = [weights_hash(tmp_path / name) for name in "abc"]
    assert hashes[0] == hashes[1] != hashes[2]


# The preference model


def test_preference_loss_against_its_closed_form() -> None:
    """log(1 + e^-(a - b)), gradient -sigmoid(b - a), also where a naive logarithm overflows."""
    scores = torch.tensor([[0.3, -0.4], [-2.0, 1.0], [-900.0, 900.0], [900.0, -900.0]], dtype=torch.double)
    scores.requires_grad_()
    each = preference.preference_loss(scores)
    expected = [math.log1p(math.exp(-0.7)), math.log1p(math.exp(3.0)), 1800.0, 0.0]
    assert each.tolist() == pytest.approx(expected, abs=1e-12)
    each.sum().backward()
    slopes = [-1 / (1 + math.exp(0.7)), -1 / (1 + math.exp(-3.0)), -1.0, 0.0]
    assert scores.grad.tolist() == [
        [pytest.approx(s, abs=1e-12), pytest.approx(-s, abs=1e-12)] for s in slopes
    ]


def test_score_is_read_at_the_end_of_the_answer(made: list[str], world: tuple) -> None:
    """Packed = each answer alone: head times the last hidden state, nothing of what stands beside it."""
    _, pairs = world
    plain = load_pretrained(made[1], torch.float64)
    model = preference.PreferenceModel(read_config(made[1])).double()
    model.load_state_dict(plain.state_dict(), strict=False)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.value.weight)
    for micro in pair_batches(pairs, 48, 3):
        scores = model.scores(micro)
        for row, number in enumerate(micro.numbers):
            for column, side in enumerate((pairs[number].chosen, pairs[number].rejected)):
                hidden = plain.hidden_states(torch.from_numpy(side.ids).long()[None])[0, -1]
                assert scores[row, column].item() == pytest.approx(
                    (model.value.weight @ hidden).item(), abs=1e-8
                )


def test_preference_run(made: list[str], tmp_path: Path) -> None:
    """Starts without an opinion, learns its pairs, and what it saves gives the same scores."""
    curve = run("preference", tmp_path / "a", *made, *LONG, "40", "--lr", "3e-3")
    assert curve[1]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert curve[40]["loss"] < 0.3 and curve[40]["accuracy"] > 0.9
    summary = json.loads((tmp_path / "a/summary.json").read_text())
    assert summary["before"]["val_accuracy"] == 0.5 and summary["before"]["val_length_correlation"] == 0
    assert summary["held out"] == 6 and 0 <= summary["after"]["val_longer_better"] <= 1
    control = run("preference", tmp_path / "b", *made, "--steps", "1", "--shuffle_labels")
    assert control[1]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_shuffled_labels_are_half_of_them(
    made: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(
        preference, "Packer", lambda sources, *_: seen.append(sources[0][0]) or sft.Packer(sources, *_)
    )
    for words in ([], ["--shuffle_labels"]):
        run("preference", tmp_path / str(len(words)), *made, "--steps", "1", *words)
    plain, shuffled = seen
    assert (
        len(plain) == 24
        and sum(
            a.chosen is not b.chosen and not np.array_equal(a.chosen.ids, b.chosen.ids)
            for a, b in zip(plain, shuffled, strict=True)
        )
        == 12
    )


# Invariances of both


@pytest.mark.parametrize("stage", ["dpo", "preference"])
def test_curve_does_not_depend_on_micro_batches_or_processes(
    stage: str, made: list[str], tmp_path: Path
) -> None:
    plain = losses(stage, tmp_path / "a", *made)
    assert max(plain) - min(plain) > 1e-3
    other = losses(stage, tmp_path / "b", *made, "--micro_batch_size", "1")
    both = run_processes(losses, 2, tmp_path, stage, tmp_path / "c", *made, "--micro_batch_size", "1")
    for found in (other, *both[:1]):
        assert max(abs(x - y) for x, y in zip(plain, found, strict=True)) < 1e-5
    one, two = (json.loads((tmp_path / name / "summary.json").read_text()) for name in "ac")
    for when in ("before", "after"):
        for name, value in one[when].items():
            assert two[when][name] == pytest.approx(value, abs=1e-3), name


@pytest.mark.parametrize("stage", ["dpo", "preference"])
def test_resume_is_bitwise(stage: str, made: list[str], tmp_path: Path) -> None:
    whole = run(stage, tmp_path / "a", *made)
    run(stage, tmp_path / "b", *made)
    shutil.rmtree(tmp_path / "b/checkpoints/step_000006")
    shutil.rmtree(tmp_path / "b/model")
    again = run(stage, tmp_path / "b", *made, "--resume")
    assert [r["loss"] for r in again.values()] == [r["loss"] for r in whole.values()]
    files = ["model.safetensors"] + [preference.HEAD] * (stage == "preference")
    for name in files:
        first, second = ((tmp_path / out / "model" / name).read_bytes() for out in "ab")
        assert first == second, name
    with pytest.raises(UserError, match="made with lr"):
        run(stage, tmp_path / "b", *made, "--resume", "--lr", "0.5")


GOLDEN = {"dpo": [0.6931, 0.0157, 0.0031], "preference": [0.6931, 0.6464, 0.6241]}


@pytest.mark.parametrize("stage", ["dpo", "preference"])
def test_golden_trajectory(stage: str, made: list[str], tmp_path: Path) -> None:
    """Twenty steps as they were when this was written; another value means that training changed."""
    curve = losses(stage, tmp_path / "a", *made, *LONG, "20", "--lr", "1e-3")
    assert [round(curve[step], 4) for step in (0, 9, 19)] == GOLDEN[stage]


# Scoring and tagging


def responses(*scores: float, category: str = "", text: str = "Hello") -> list[preference.Response]:
    prompt = Prompt([{"role": "user", "content": text}], category=category)
    return [preference.Response(prompt, {"role": "assistant", "content": "x"}, score) for score in scores]


def test_tags_are_quantiles_of_each_language_and_category() -> None:
    easy, hard = responses(*range(100), category="easy"), responses(*range(-500, -450), category="hard")
    chinese = responses(*range(50), category="easy", text="你好吗")
    preference.tag([*hard, *easy, *chinese], 5)
    for members in (easy, hard, chinese):
        tags = [member.quality for member in sorted(members, key=lambda m: m.score)]
        assert tags == sorted(tags) and set(Counter(tags).values()) == {len(members) // 5}
    equal = responses(*[1.0] * 30)
    preference.tag(equal, 5)
    assert {member.quality for member in equal} == {2}
    three = responses(*range(30))
    preference.tag(three, 3)
    assert Counter(member.quality for member in three) == {0: 10, 2: 10, 4: 10}
    few = [one for c in "abcdef" for one in responses(*range(5), category=c)]
    preference.tag(few, 5)  # ranked together, not each category for itself
    assert Counter(member.quality for member in few) == {0: 6, 1: 6, 2: 6, 3: 6, 4: 6}


def test_scored_tagged_and_read_by_fine_tuning(made: list[str], tmp_path: Path) -> None:
    run("preference", tmp_path / "pm", *made, *LONG, "20", "--lr", "3e-3")
    scorer = str(tmp_path / "pm/model")
    row = {"messages": [{"role": "user", "content": "sort 21"}], "answer": "12", "task": "sorting"}
    made_file = tmp_path / "responses.jsonl"
    ended = [{"content": text, "finish_reason": "stop"} for text in ("12", "21", "1" * 60)]
    cut = {"content": "1", "finish_reason": "length"}
    made_file.write_text(json.dumps(row | {"responses": [*ended, cut], "chosen": None}) + "\n")
    words = ["--score", str(made_file), "--scorer", scorer]
    run_scorer = lambda out, *w: score_words(tmp_path / out, *w)  # noqa: E731
    summary, lines = run_scorer("t", *words)
    assert summary["counts"] == {"responses": 3, "cut off": 1, "too long, scored without the beginning": 1}
    assert sum(one["responses"] for one in summary["tags"].values()) == 3
    assert all("right" in one for one in summary["tags"].values())
    assert sorted(line["messages"][-1]["quality"] for line in lines) == sorted({0, 2, 4} & {0, 1, 2, 3, 4})
    talks = read_conversations(tmp_path / "t/tagged.jsonl").conversations
    tokenizer, config = load_tokenizer(scorer), sft.Config(chat_format="tulu", quality_tags=True, seq_len=96)
    items, _ = sft.render_all(talks, tokenizer, config)
    tags = {tokenizer.special_tokens[f"<quality_{k}>"] for k in range(5)}
    assert all(len(tags & set(item.ids.tolist())) == 1 for item in items)
    # Public pairs and plain conversations are scored too, in any number of processes.
    summary, one = run_scorer("u", "--score", made[3], "--scorer", scorer)
    assert summary["counts"]["responses"] == 60
    both = run_processes(score_words, 2, tmp_path, tmp_path / "v", "--score", made[3], "--scorer", scorer)
    for line, other in zip(one, both[0][1], strict=True):
        assert line["score"] == pytest.approx(other["score"], abs=1e-4)
    (tmp_path / "talks.jsonl").write_text(
        "".join(json.dumps({"messages": line["messages"]}) + "\n" for line in one)
    )
    _, again = run_scorer("w", "--score", str(tmp_path / "talks.jsonl"), "--scorer", scorer)
    assert [line["score"] for line in again] == pytest.approx([line["score"] for line in one], abs=1e-4)


def score_words(out: Path, *words: str) -> tuple[dict, list[dict]]:
    before, sys.argv = sys.argv, ["preference.py", *FAST, "--out", str(out), "--preset", "tiny", *words]
    try:
        preference.main()
    finally:
        sys.argv = before
    lines = [json.loads(line) for line in (out / "tagged.jsonl").read_text().splitlines()]
    return json.loads((out / "summary.json").read_text()), lines


def test_chat_asks_for_a_quality(made: list[str]) -> None:
    tokenizer = load_tokenizer(made[1])
    best, worst = (tokenizer.special_tokens[f"<quality_{k}>"] for k in (4, 0))
    for word, tag in (("best", best), ("worst", worst), ("4", best), ("", None)):
        conversation = Conversation(tokenizer, quality=word)
        conversation.add_user("sort 21")
        found = {best, worst} & set(conversation.ids)
        assert found == ({tag} if tag else set())
    conversation = Conversation(tokenizer, quality="best")
    conversation.add_user("sort 21")
    assert [worst if i == best else i for i in conversation.ids] == conversation.avoided() != conversation.ids


# Mistakes


@pytest.mark.parametrize(
    ("module", "words", "kind", "complaint"),
    [
        (dpo, ["--beta", "0"], UsageError, "--beta must be above 0"),
        (dpo, ["--loss", "ipo"], UsageError, "one of sigmoid, sigmoid_norm"),
        (dpo, ["--los", "sigmoid"], UsageError, "did you mean --loss"),
        (dpo, ["--data", "none.jsonl"], UsageError, "give --init_from"),
        (dpo, ["--init_from", "m"], UsageError, "--init_from needs --data"),
        (dpo, ["--init_from", "nowhere", "--data", "none.jsonl"], UserError, "nowhere: no such folder"),
        (preference, ["--score", "f"], UsageError, "go together"),
        (preference, ["--levels", "9"], UsageError, "between 2 and 5"),
        (preference, ["--val_fraction", "1"], UsageError, "between 0 and 1"),
    ],
)
def test_mistakes(module: ModuleType, words: list[str], kind: type, complaint: str, tmp_path: Path) -> None:
    before, sys.argv = sys.argv, [module.__name__, "--preset", "tiny", "--out", str(tmp_path / "run"), *words]
    try:
        with pytest.raises(kind, match=complaint):
            module.main()
    finally:
        sys.argv = before


def test_prompts_without_room_for_an_answer_are_not_asked(
    made: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = [*made, "--steps", "1", "--max_new_tokens", "46"]
    run("dpo", tmp_path / "a", *words)
    assert "held-out prompts leave no room for an answer and are not asked" in capsys.readouterr().out


def test_strange_inputs_are_named(made: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        run("dpo", tmp_path / "a", *made[:2], "--data", "none.jsonl")
    with pytest.raises(UsageError, match="trained in the tulu format"):
        run("dpo", tmp_path / "b", *made, "--chat_format", "moss")
    with pytest.raises(UserError, match=r"no pair within --seq_len 8: .*pairs.jsonl:\d+: over length"):
        run("preference", tmp_path / "c", *made, "--seq_len", "8")
    with pytest.raises(UsageError, match="no preference model"):
        score_words(tmp_path / "d", "--score", made[3], "--scorer", made[1])
    (tmp_path / "bad.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "q"}], "responses": [{}]}\n'
    )
    with pytest.raises(UserError, match=r"bad.jsonl:1: no response to score"):
        preference.read_responses(str(tmp_path / "bad.jsonl"))


@pytest.mark.parametrize("stage", [dpo, preference])
def test_presets_are_valid_and_dry_runs_cost_nothing(
    stage: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for name, preset in stage.PRESETS.items():
        stage.Config(preset=name, **preset)
    before, sys.argv = sys.argv, ["x", "--preset", "tiny", "--dry_run", "--out", str(tmp_path / "run")]
    try:
        stage.main()
    finally:
        sys.argv = before
    assert "parameters" in capsys.readouterr().out and not (tmp_path / "run").exists()
