"""Comparisons: schemas of pairs, judges, and pairs made by sampling and judging, killed and gone on with."""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

import data.pairs as pairs_module
from core.checkpoint import load_pretrained, save_pretrained
from core.config import UsageError, UserError
from core.generate import generate
from data.chat import chat_template
from data.judges import KEY, HttpJudge, RuleJudge, in_both_orders, make_judge, read_verdict, repetition
from data.packing import Item
from data.pair_batches import (
    Pair,
    PairConfig,
    PairItem,
    convert,
    pair_batches,
    read_pairs,
    render_pairs,
    split,
)
from data.pairs import Config, make_pairs
from data.prompts import Prompt, read_prompts
from data.prompts import convert as convert_prompt
from data.tokenizer import train_tokenizer
from model import Config as Shape
from model import Transformer


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict:
    return {"role": "assistant", "content": text, **more}


ASKED = Prompt([user("sort 321")], "123", "sorting")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model that likes to end its answers, with its tokenizer."""
    tokenizer = train_tokenizer(["<|user|>\nsort 73915240\n<|assistant|>\n01234579"] * 20, 290)
    tokenizer.chat_template = chat_template(tokenizer, "tulu")
    shape = Shape(
        vocab_size=290, layers=1, dim=32, heads=2, kv_heads=2, head_dim=16, ffn_dim=32, max_seq_len=512
    )
    model = Transformer(shape)
    with torch.no_grad():  # digits and the end are likely
        model.embed.weight[:, 0] = 4.0
        likely = tokenizer.encode("0123456789") + [tokenizer.eos_id]
        model.head.weight[likely, 0] = 2.0
    place = tmp_path_factory.mktemp("pairs") / "model"
    save_pretrained(model, place, tokenizer)
    return place


# Reading


@pytest.mark.parametrize(
    "record",
    [
        {"chosen": [user("q"), assistant("good")], "rejected": [user("q"), assistant("bad")]},
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"question": "q", "chosen": "good", "rejected": "bad"},
        {"prompt": [user("q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]},
        {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"},
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        {
            "instruction": "q",
            "completions": [
                {"response": r, "overall_score": s} for r, s in (("bad", 2), ("good", "8.5"), ("x", 4))
            ],
        },
    ],
    ids=["messages", "strings", "question", "explicit prompt", "hh-rlhf", "llama-factory", "ultrafeedback"],
)
def test_schemas_of_pairs(record: dict) -> None:
    pair = convert(record)
    assert pair.prompt.messages == [user("q")]
    assert (pair.chosen, pair.rejected) == (assistant("good"), assistant("bad"))


def test_system_messages_and_history_stay() -> None:
    record = {"system": "s", "question": "q", "chosen": "good", "rejected": "bad"}
    assert [m["role"] for m in convert(record).prompt.messages] == ["system", "user"]
    talk = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: "
    assert len(convert({"chosen": talk + "x", "rejected": talk + "y"}).prompt.messages) == 3


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"prompt": "q", "chosen": "good"}, "the rejected side is missing"),
        ({"prompt": "q", "chosen": None, "rejected": "b"}, "the chosen side is missing"),
        ({"chosen": "good", "rejected": "bad"}, "no messages, conversations, prompt"),
        (
            {"chosen": [user("q"), assistant("a")], "rejected": [user("r"), assistant("b")]},
            "different prompts",
        ),
        ({"chosen": [user("q"), assistant("a")], "rejected": [user("q"), user("b")]}, "assistant's text"),
        ({"prompt": "q", "chosen": " ", "rejected": "b"}, "the chosen side is empty"),
        ({"prompt": "q", "chosen": "a", "rejected": [{"role": "robot", "content": "b"}]}, "unknown role"),
        (["q", "a", "b"], "expected an object"),
    ],
)
def test_bad_pairs_are_named_and_counted(record: Any, complaint: str, tmp_path: Path) -> None:
    good = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in (good, record, good)))
    with pytest.raises(UserError, match=rf"pairs.jsonl:2: .*{complaint}.*--skip_bad"):
        read_pairs((str(file),))
    reading = read_pairs((str(file),), skip_bad=True)
    assert reading.counts == {"read": 2, "bad": 1} and complaint in reading.remarks[0]


def test_pairs_that_teach_nothing_are_counted(folder: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": "q", "chosen": "same", "rejected": "same"},
        {"messages": [user("q")], "responses": [], "chosen": None, "rejected": None},
        {"instruction": "q", "completions": [{"response": r, "overall_score": 3} for r in "ab"]},
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"prompt": "q", "chosen": "9 " * 100, "rejected": "bad"},
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reading = read_pairs((str(file),))
    assert reading.counts == {"equal answers": 1, "no verdict": 2, "read": 2}
    assert [remark.split(": ", 1)[1] for remark in reading.remarks] == [
        "equal answers",
        "no verdict",
        "no verdict",
    ]
    tokenizer = pairs_module.load_tokenizer(folder)
    config = PairConfig(warm_steps=1, seq_len=64)
    items, counts, remarks = render_pairs(reading.pairs, tokenizer, config)
    assert len(items) == 1 and counts == {"pairs": 1, "pairs over length": 1}
    assert ":5: over length" in remarks[0] and "--seq_len 64" in remarks[0]
    config.too_long = "cut"
    items, counts, remarks = render_pairs(reading.pairs, tokenizer, config)
    assert counts == {"pairs": 1, "pairs cut": 1} and not remarks and len(items[1].chosen.ids) == 64
    file.write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(UserError, match="no usable pair .*1 equal answers"):
        read_pairs((str(file),))


def test_real_pairs_are_read(real_data: Path) -> None:
    for name in ("dpo_en_demo", "dpo_zh_demo"):
        reading = read_pairs((str(real_data / f"pairs/{name}.json"),))
        assert reading.counts.total() == 300 and reading.counts["bad"] == 0


def test_only_the_last_answer_counts(folder: Path) -> None:
    tokenizer = pairs_module.load_tokenizer(folder)
    talk = [user("1"), assistant("22"), user("3")]
    pair = Pair(Prompt(talk), assistant("45"), assistant("6"))
    (item,), _, _ = render_pairs([pair], tokenizer, PairConfig(warm_steps=1, seq_len=100))
    assert tokenizer.decode(item.chosen.ids[item.chosen.mask].tolist()).startswith("45")
    assert item.chosen.ids[item.chosen.mask][-1] == tokenizer.eos_id
    assert item.rejected.mask.sum() == 2


def test_no_prompt_is_on_both_sides() -> None:
    pairs = [Pair(Prompt([user(str(i % 20))]), assistant("a"), assistant(f"b{i}")) for i in range(100)]
    train, held_out = split(pairs, 0.2, seed=0)
    sides = [{pair.prompt.messages[0]["content"] for pair in side} for side in (train, held_out)]
    assert len(train) + len(held_out) == 100 and len(sides[1]) == 4 and not sides[0] & sides[1]
    assert split(pairs, 0.2, seed=1)[1] != held_out


def test_prompts_of_all_kinds(tmp_path: Path) -> None:
    assert convert_prompt({"messages": [user("q"), assistant("a")]}).messages == [user("q")]
    checked = convert_prompt({"problem": "sort 21", "answer": "12", "task": "sorting"})
    assert checked.check("12") == 1.0 and checked.check("21") == 0.0
    assert convert_prompt(checked.record()) == checked
    assert convert_prompt({"prompt": "q"}).check("x") is None
    assert len(read_prompts("conversations", 7, 0)) == 7
    train, test = (read_prompts("sorting", 5, 0, held_out=side) for side in (False, True))
    assert not {p.messages[0]["content"] for p in train} & {p.messages[0]["content"] for p in test}
    (tmp_path / "p.jsonl").write_text('{"prompt": "q"}\n{"reply": "x"}\n')
    with pytest.raises(UserError, match=r"p.jsonl:2: no messages"):
        read_prompts(str(tmp_path / "p.jsonl"), 0, 0)


# Judges


def test_rule_judge() -> None:
    judge = RuleJudge()
    assert (
        judge(ASKED, "123", "132") == 1 and judge(ASKED, "132", "123") == -1 and judge(ASKED, "1", "2") == 0
    )
    free = Prompt([user("你好，今天天气怎么样？")])
    assert judge(free, "今天天气很好。", "It is fine.") == 1
    assert repetition("the same again, " * 20) > 0.9 and repetition("Nothing here is said twice.") == 0
    assert judge(Prompt([user("Hi")]), "Nice to meet you.", "so nice " * 40) == 1


@pytest.mark.parametrize(
    ("said", "verdict"),
    [("A", 1), (" b.", -1), ("**C**", 0), ("Answer A is better", 1), ("B, because", -1), ("A is", 1)]
    + [("", None), ("Both", None), ("A good question", None), ("I think B", None), ("D", None), ("42", None)],
)
def test_verdicts_are_read_strictly(said: str, verdict: int | None) -> None:
    assert read_verdict(said) == verdict


def test_only_verdicts_that_agree_count() -> None:
    by_length = lambda prompt, a, b: (len(a) > len(b)) - (len(a) < len(b))  # noqa: E731
    assert in_both_orders(by_length, ASKED, "aa", "b") == (1, [1, -1])
    assert in_both_orders(by_length, ASKED, "a", "b") == (0, [0, 0])
    assert in_both_orders(lambda *_: 1, ASKED, "a", "b") == (0, [1, 1])  # always the first
    assert in_both_orders(lambda *_: None, ASKED, "a", "b")[0] is None


def test_model_as_judge(folder: Path) -> None:
    """A random model says digits: no usable verdict, and no crash."""
    assert make_judge(f"model:{folder}")(ASKED, "123", "321") is None
    with pytest.raises(UsageError, match="expected rule, model:FOLDER"):
        make_judge("oracle")


class Endpoint:
    """A stub of an OpenAI-compatible server: answers from a queue of (status, body), else by a rule."""

    def __init__(self) -> None:
        self.queue: list[tuple[int, str]] = []
        self.requests: list[tuple[dict, dict]] = []
        self.pause = 0.0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((dict(self.headers), body))
                time.sleep(outer.pause)
                status, content = outer.queue.pop(0) if outer.queue else (200, outer.verdict(body))
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", "http://127.0.0.1:9/elsewhere")
                with contextlib.suppress(ConnectionError):  # the client gave up waiting
                    self.end_headers()
                    self.wfile.write(content.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @staticmethod
    def reply(text: str) -> str:
        return json.dumps({"choices": [{"message": {"content": text}}]})

    def verdict(self, body: dict) -> str:
        """Prefers what comes first in the alphabet."""
        text = body["messages"][0]["content"]
        a, b = text.split("Answer A:\n")[1].split("\n\nWhich")[0].split("\n\nAnswer B:\n")
        return self.reply("A" if a < b else "B" if b < a else "C")


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    made = Endpoint()
    yield made
    made.server.shutdown()
    made.server.server_close()


def test_http_judge(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "secret-key")
    judge = HttpJudge(endpoint.url, "judge-7b", timeout=2.0, tries=3, pause=0.01)
    assert in_both_orders(judge, ASKED, "123", "321") == (1, [1, -1])
    headers, body = endpoint.requests[0]
    assert headers["Authorization"] == "Bearer secret-key" and body["model"] == "judge-7b"
    assert "sort 321" in body["messages"][0]["content"]
    # What may pass is tried again; nonsense is no verdict.
    endpoint.queue = [(503, ""), (429, ""), (200, endpoint.reply("B"))]
    assert judge(ASKED, "1", "2") == -1
    for nonsense in (
        "not JSON",
        "{}",
        endpoint.reply("As an AI"),
        '{"choices": []}',
        "[1]",
        endpoint.reply(""),
    ):
        endpoint.queue = [(200, nonsense)]
        assert judge(ASKED, "1", "2") is None
    endpoint.queue = [(200, json.dumps({"choices": [{"message": {"content": None}}]}))]
    assert judge(ASKED, "1", "2") is None
    # What will not pass ends in one line, and no line holds the key.
    for status, complaint in ((401, f"is {KEY} right"), (404, "is the address right"), (302, "HTTP 302")):
        endpoint.queue = [(status, "secret-key")]
        with pytest.raises(UserError, match=complaint) as caught:
            judge(ASKED, "1", "2")
        assert "secret-key" not in str(caught.value)
    endpoint.queue = [(500, "")] * 3
    with pytest.raises(UserError, match="HTTP 500, 3 times; .*run again"):
        judge(ASKED, "1", "2")
    endpoint.pause = 3.0
    slow = HttpJudge(endpoint.url, "", timeout=0.1, tries=2, pause=0.01)
    with pytest.raises(UserError, match="timed out, 2 times"):
        slow(ASKED, "1", "2")
    with pytest.raises(UserError, match="refused, 1 times"):
        HttpJudge("http://127.0.0.1:9/v1", "", tries=1)(ASKED, "1", "2")


# Making pairs


def config_of(folder: Path, out: Path, **changes: Any) -> Config:
    options = dict(prompts="sorting", count=30, max_new_tokens=16, chunk=8, device="cpu")
    return Config(model=str(folder), out=str(out), **{**options, **changes})


def test_pairs_are_made(folder: Path, tmp_path: Path, endpoint: Endpoint) -> None:
    out = tmp_path / "pairs.jsonl"
    counts = make_pairs(config_of(folder, out, judge=endpoint.url))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["number"] for row in rows] == list(range(30)) and counts.total() == 30
    assert counts["pairs"] == sum(row["chosen"] is not None for row in rows) > 10
    for row in rows:
        assert len(row["responses"]) == 4 and row["judge"] == endpoint.url and row["seed"] == 0
        if row["chosen"]:
            better, worse = (row[side][-1]["content"] for side in ("chosen", "rejected"))
            assert better < worse and row["verdicts"][-1] in ([1, -1], [-1, 1])
            ended = [r["content"] for r in row["responses"] if r["finish_reason"] == "stop"]
            assert better in ended and worse in ended
        else:
            assert row["why"] in ("equal answers", "answers cut off or empty")
    assert read_pairs((str(out),)).counts["read"] == counts["pairs"]
    again = make_pairs(config_of(folder, out, judge=endpoint.url))  # nothing is left to do
    assert again == counts and len(out.read_text().splitlines()) == 30
    with pytest.raises(UserError, match="made with another model, other prompts or other settings"):
        make_pairs(config_of(folder, out, judge=endpoint.url, temperature=0.5))


def test_scores_and_reasons(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "a.jsonl"
    make_pairs(config_of(folder, out, count=4))
    assert all("score" in r for line in out.open() for r in json.loads(line)["responses"])
    for verdict, why in (
        (None, "judge said nothing usable"),
        (1, "no two answers told apart in both orders"),
    ):
        monkeypatch.setattr(pairs_module, "make_judge", lambda *_, said=verdict: lambda *_: said)
        counts = make_pairs(config_of(folder, tmp_path / f"{verdict}.jsonl", count=8))
        assert counts[why] > 3 and counts["pairs"] == 0 and counts.total() == 8


def test_killed_at_any_instant_no_pair_is_lost_or_doubled(
    folder: Path, tmp_path: Path, endpoint: Endpoint
) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    make_pairs(config_of(folder, whole, judge=endpoint.url))
    endpoint.pause = 0.02
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "core.resume", "core.parallel", "data.text", "data.pairs"])
    for wanted in (3, 11, 20):
        process = context.Process(target=make_pairs, args=(config_of(folder, out, judge=endpoint.url),))
        process.start()
        deadline = time.monotonic() + 60
        while not out.exists() or out.read_bytes().count(b"\n") < wanted:
            assert time.monotonic() < deadline and process.is_alive()
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert out.read_bytes().count(b"\n") < 30
    os.truncate(out, out.stat().st_size - 7)  # as if the last kill had come in the middle of a line
    endpoint.pause = 0.0
    make_pairs(config_of(folder, out, judge=endpoint.url))
    assert out.read_text() == whole.read_text()


def test_strange_files_are_refused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "pairs.jsonl"
    for content in ('{"prompt": "q"}\n', "[1]\n", "text\n"):
        out.write_text(content)
        with pytest.raises(UserError, match=r"pairs.jsonl:1: not a line of this program"):
            make_pairs(config_of(folder, out))
    out.unlink()
    make_pairs(config_of(folder, out, count=4))
    lines = out.read_text().splitlines(keepends=True)
    out.write_text(lines[0] + lines[2])
    with pytest.raises(UserError, match=r"pairs.jsonl:2: out of order"):
        make_pairs(config_of(folder, out, count=4))


# Batches


def test_every_pair_is_in_one_batch_of_one_process() -> None:
    torch.manual_seed(0)

    def side(length: int) -> Item:
        mask = torch.arange(length) >= length // 2
        return Item(torch.randint(0, 99, (length,)).int().numpy(), mask.numpy())

    pairs = [PairItem(side(5 + i % 9), side(4 + i % 7)) for i in range(23)]
    for world_size in (1, 2, 3):
        shares = [pair_batches(pairs, 32, 3, rank, world_size) for rank in range(world_size)]
        assert len({len(share) for share in shares}) == 1
        assert sorted(n for share in shares for micro in share for n in micro.numbers) == list(range(23))
        for micro in (micro for share in shares for micro in share):
            counted = micro.sums((micro.batch.targets >= 0).float())
            assert counted.tolist() == micro.lengths.tolist()
            ids = micro.batch.tokens.flatten()[micro.ends]
            expected = [[pairs[n].chosen.ids[-1], pairs[n].rejected.ids[-1]] for n in micro.numbers]
            assert ids.tolist() == expected


# Contrast


def test_contrast_leads_away_from_another_prompt(folder: Path) -> None:
    """Against the mixture of two forwards without a cache; alone and in a full batch."""
    model = load_pretrained(folder)
    torch.manual_seed(0)
    asked = [torch.randint(0, 280, (n,)).tolist() for n in (5, 9, 7)]
    avoided = [[*prompt[:2], (prompt[2] + 1) % 280, *prompt[3:]] for prompt in asked]
    options = dict(max_new_tokens=6, temperature=0.0)
    made = generate(model, asked, avoided=avoided, contrast=0.7, max_batch=5, **options)
    for prompt, other, (completion,) in zip(asked, avoided, made, strict=True):
        for token in completion.tokens:
            with torch.no_grad():
                best, worst = (model(torch.tensor([ids]))[0, -1] for ids in (prompt, other))
            assert (best + 0.7 * (best - worst)).argmax() == token
            prompt, other = [*prompt, token], [*other, token]
    sampled = generate(model, asked, 8, 3, avoided=avoided, contrast=0.7, seed=5)
    alone = generate(model, asked[:1], 8, 3, avoided=avoided[:1], contrast=0.7, seed=5)
    assert [c.tokens for c in alone[0]] == [c.tokens for c in sampled[0]]
    assert len({tuple(c.tokens) for c in sampled[0]}) > 1
    with pytest.raises(UserError, match="same number of tokens"):
        generate(model, asked, avoided=[prompt[1:] for prompt in avoided], contrast=0.7)
