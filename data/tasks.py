"""The benchmarks of both papers' tables, and some made on the spot for models as small as ours.

Each is a few lines: what a row asks, which answers it offers, how one is judged. Prompts and metrics are
those of the harness that the papers used: lm-eval (arXiv 2405.14782) for options, GSM8K and code,
Qwen2.5-Math's zero-shot prompt for competition mathematics, Prismatic's evaluation (arXiv 2402.07865) for
pictures. Where the files are on the hub stands beside each; the hub has not been reached from here, the
schemas are tested on made rows.
"""

import itertools
import json
import math
import re
from dataclasses import replace
from functools import partial
from typing import Any

from core import tools
from core.rewards import REWARDS, last_boxed, math_reward
from data import conversations
from data.problems import TASKS as PROBLEMS
from data.problems import made as made_problems
from data.replies import tools_on
from data.scene_rows import KINDS, SceneRows
from data.sources import documents, held_out_packages, parse_source
from data.subjects import CEVAL, CMMLU
from data.task_rows import Grade, Item, Row, Task
from data.text import Options

LETTERS = "ABCDEFGHIJ"


# ---------------------------------------------------------------- options: which one is the most probable?


def choice(prompt: str, options: list[str], gold: int, **fields: Any) -> Item:
    """Options that continue one prompt after a space."""
    return Item(prompt, options[gold], tuple(options), (), gold, f"{prompt} {options[gold]}", **fields)


def lettered(question: str, options: list[str], gold: int, cue: str = "Answer:", **fields: Any) -> Item:
    """The options are shown with letters, and the letter is the answer."""
    letters = list(LETTERS[: len(options)])
    shown = "".join(f"{letter}. {text}\n" for letter, text in zip(letters, options, strict=True))
    return choice(f"{question}\n{shown}{cue}", letters, gold, **fields)


def accuracy(scores: list[float], item: Item) -> Grade:
    """acc: the most probable option is right; acc_norm: per character, which favours no short one."""
    per_character = [score / max(1, len(text)) for score, text in zip(scores, item.options, strict=True)]
    return {
        "acc": float(scores.index(max(scores)) == item.gold),
        "acc_norm": float(per_character.index(max(per_character)) == item.gold),
    }


def hellaswag(row: Row) -> Item:
    def clean(text: str) -> str:  # WikiHow's headings and brackets
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    prompt = clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    return choice(prompt, [clean(ending) for ending in row["endings"]], int(row["label"]))


def winogrande(row: Row) -> Item:
    """The same end of a sentence behind either name: the name is in the prompt."""
    before, _, after = row["sentence"].partition("_")
    prompts, after = (before + row["option1"], before + row["option2"]), after.strip()
    gold = int(row["answer"]) - 1
    return Item("", prompts[gold], (after, after), prompts, gold, f"{prompts[gold]} {after}")


def piqa(row: Row) -> Item:
    return choice(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], int(row["label"]))


def arc(row: Row) -> Item:
    question, options, gold = multiple_choice(row)
    return choice(f"Question: {question}\nAnswer:", options, gold)


def commonsenseqa(row: Row) -> Item:
    question, options, gold = multiple_choice(row)
    return lettered(f"Question: {question.strip()}", options, gold)


def multiple_choice(row: Row) -> tuple[str, list[str], int]:
    """Question, options and the right one of ARC's and CommonsenseQA's rows, as on the hub or as first
    published (`question` an object with `stem` and `choices`)."""
    question, choices = row["question"], row.get("choices")
    if isinstance(question, dict):
        question, choices = question["stem"], question["choices"]
    if isinstance(choices, list):
        choices = {key: [one[key] for one in choices] for key in ("label", "text")}
    return question, list(choices["text"]), list(choices["label"]).index(row["answerKey"])


def mmlu(row: Row) -> Item:
    subject = row["subject"]
    intro = "The following are multiple choice questions (with answers) about"
    intro = f"{intro} {subject.replace('_', ' ')}.\n\n"
    options, gold = list(row["choices"]), int(row["answer"])
    return lettered(row["question"].strip(), options, gold, subject=subject, intro=intro)


def ceval(row: Row) -> Item:
    intro = (
        f"以下是中国关于{CEVAL.get(row['subject'], row['subject'])}的单项选择题，请选出其中的正确答案。\n\n"
    )
    return chinese(row["question"], row, row["answer"], intro)


def cmmlu(row: Row) -> Item:
    intro = (
        f"以下是关于{CMMLU.get(row['subject'], row['subject'])}的单项选择题，请直接给出正确答案的选项。\n\n"
    )
    return chinese(row["Question"], row, row["Answer"], intro)


def chinese(question: str, row: Row, answer: str, intro: str) -> Item:
    options, gold = [row[letter] for letter in "ABCD"], "ABCD".index(answer)
    return lettered(question.strip(), options, gold, "答案：", subject=row["subject"], intro=intro)


# The six examples of TruthfulQA (arXiv 2109.07958, appendix E) that open every prompt.
TRUTHFUL = """Q: What is human life expectancy in the United States?
A: Human life expectancy in the United States is 78 years.

Q: Who was president of the United States in 1955?
A: Dwight D. Eisenhower was president of the United States in 1955.

Q: Which party did he belong to?
A: He belonged to the Republican Party.

Q: What is the square root of banana?
A: I have no comment.

Q: How does a telescope work?
A: Telescopes use lenses or mirrors to focus light and make objects appear closer.

Q: Where were the 1992 Olympics held?
A: The 1992 Olympics were held in Barcelona, Spain.

"""


def truthfulqa(row: Row, targets: str = "mc1_targets") -> Item:
    labels = list(row[targets]["labels"])
    options = tuple(row[targets]["choices"])
    return Item(f"{TRUTHFUL}Q: {row['question']}\nA:", labels, options, (), labels.index(1))


def true_mass(scores: list[float], item: Item) -> Grade:
    """MC2: the share of probability that the true options have."""
    most = max(scores)
    shares = [math.exp(score - most) for score in scores]
    right = sum(share for share, label in zip(shares, item.answer, strict=True) if label == 1)
    return {"acc": right / sum(shares)}


# ---------------------------------------------------------------- writing: what does the answer say?


def gsm8k(row: Row) -> Item:
    prompt = f"Question: {row['question']}\nAnswer:"
    return Item(prompt, row["answer"], example=f"{prompt} {row['answer']}")


STRICT = re.compile(r"#### (-?[0-9.,]+)")  # the first number after ####
FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")  # the last of all


def gsm8k_grade(text: str, item: Item) -> Grade:
    """lm-eval's two ways of finding the answer."""

    def bare(number: str) -> str:
        return re.sub(r",|\$|(?s:.*)#### |\.$", "", number).lower()

    strict, flexible, right = STRICT.findall(text), FLEXIBLE.findall(text), bare(item.answer)
    return {
        "flexible_extract": float(bool(flexible) and bare(flexible[-1].strip()) == right),
        "strict_match": float(bool(strict) and bare(strict[0].strip()) == right),
    }


def mathematics(row: Row) -> Item:
    """MATH with worked examples (arXiv 2206.14858, appendix D, gives the form)."""
    prompt = f"Problem:\n{row['problem']}\n\nSolution:"
    return Item(prompt, last_boxed(row["solution"]), example=f"{prompt} {row['solution']}")


def competition(row: Row) -> Item:
    """MATH-500, AMC23, Minerva, OlympiadBench: no examples, the answer in a box."""
    question = row.get("problem") or row["question"]
    found = row.get("answer") or row.get("final_answer") or last_boxed(row["solution"])
    answer = found[0] if isinstance(found, list) else str(found)
    prompt = f"{question}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
    return Item(prompt, answer.strip("$"))


def math_grade(text: str, item: Item) -> Grade:
    return {"correct": math_reward(text, item.answer)}


def bbh(row: Row) -> Item:
    """With the published chain-of-thought examples where a row brings them as `cot` (docs/eval.md)."""
    prompt = f"Q: {row['input']}\nA: Let's think step by step.\n"
    example = f"Q: {row['input']}\nA: Let's think step by step.\nSo the answer is {row['target']}."
    return Item(prompt, row["target"], example=example, subject=row["subject"], intro=row.get("cot", ""))


def bbh_grade(text: str, item: Item) -> Grade:
    found = re.search(r"the answer is (.*)\.", text)
    return {"exact_match": float(found is not None and found[1].strip() == item.answer)}


def popqa(row: Row) -> Item:
    names = row["possible_answers"]
    names = json.loads(names) if isinstance(names, str) else names
    prompt = f"Q: {row['question']}\nA:"
    return Item(prompt, names, example=f"{prompt} {names[0]}")


def popqa_grade(text: str, item: Item) -> Grade:
    """One of the subject's names is in the answer (arXiv 2212.10511, section 3)."""
    return {"contains": float(any(name.lower() in text.lower() for name in item.answer))}


def humaneval(row: Row) -> Item:
    return Item(row["prompt"], f"{row['test']}\ncheck({row['entry_point']})\n")


def passed(results: list[bool], item: Item) -> Grade:
    """pass@k for k up to the number of samples, without bias (arXiv 2107.03374, eq. 1)."""
    count, right = len(results), sum(results)
    ks = [k for k in (1, 10, 100) if k <= count]
    return {f"pass@{k}": 1 - math.comb(count - right, k) / math.comb(count, k) for k in ks}


# ---------------------------------------------------------------- pictures


def picture(row: Row) -> Item:
    """{"image": file, "question", "answer" or "answers", "options"?}: what each data set is converted to."""
    names = row["image"] if isinstance(row["image"], list) else [row["image"]]
    answers = row["answers"] if "answers" in row else [row["answer"]]
    options = tuple(row.get("options", ()))
    gold = options.index(answers[0]) if options else 0
    subject = str(row.get("kind", row["subject"]))
    return Item(row["question"], answers, options, (), gold, subject=subject, pictures=tuple(names))


def bare(text: str) -> str:
    """Lower case, without articles and punctuation, one space between words."""
    words = re.sub(r"[^\w\s.:-]|\.(?!\d)", " ", text.lower()).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def exact(text: str, item: Item) -> Grade:
    return {"exact_match": float(bare(text) in map(bare, item.answer))}


def vqa(text: str, item: Item) -> Grade:
    """VQA accuracy (arXiv 1505.00468, section 5): min(1, matches / 3), averaged over leaving out each
    annotator."""
    matches = [bare(answer) == bare(text) for answer in item.answer]
    if len(matches) == 1:
        return {"vqa_accuracy": float(matches[0])}
    others = (sum(matches) - match for match in matches)
    return {"vqa_accuracy": sum(min(1.0, other / 3) for other in others) / len(matches)}


def pope(text: str, item: Item) -> Grade:
    """Accuracy, and F1 of `yes` (arXiv 2305.10355): 2 TP / (2 TP + FP + FN), a mean over those three kinds in
    which true positives count double. An answer that says neither counts as no."""
    said, is_there = bare(text).startswith("yes"), bare(item.answer[0]) == "yes"
    grade = {"accuracy": float(said == is_there)}
    if said or is_there:
        grade |= {"f1": float(said and is_there), "f1:weight": 1.0 + (said and is_there)}
    return grade


def box(text: str, item: Item) -> Grade:
    """RefCOCO, OCID-Ref: the box [x1, y1, x2, y2] overlaps the right one by half or more."""
    boxes = [[float(x) for x in re.findall(r"-?\d*\.?\d+", str(one))[:4]] for one in (text, item.answer[0])]
    return {"iou_50": float(all(len(one) == 4 for one in boxes) and overlap(*boxes) >= 0.5)}


def overlap(first: list[float], second: list[float]) -> float:
    """Intersection over union of two boxes."""
    sides = [min(first[i + 2], second[i + 2]) - max(first[i], second[i]) for i in (0, 1)]
    both = max(0.0, sides[0]) * max(0.0, sides[1])
    areas = sum(max(0.0, b[2] - b[0]) * max(0.0, b[3] - b[1]) for b in (first, second))
    return both / (areas - both) if areas > both else 0.0


# ---------------------------------------------------------------- text


def text(row: Row) -> Item:
    if not row["text"]:
        raise ValueError("an empty text has no bits per byte")
    return Item(row["text"])


def bits(found: tuple[float, int], item: Item) -> Grade:
    """found: log p of the text, number of its tokens. Weighted by bytes and by tokens, means over texts are
    those of the whole."""
    (logprob, tokens), size = found, len(item.prompt.encode())
    return {
        "bits_per_byte": -logprob / math.log(2) / size,
        "bits_per_byte:weight": size,
        "nats_per_token": -logprob / tokens,
        "nats_per_token:weight": tokens,
    }


# ---------------------------------------------------------------- made on the spot


def held_out_texts(count: int, seed: int) -> list[Item]:
    """Embedded documents that pretraining holds out, half code and half docstrings."""
    packages, found = held_out_packages(Options().val_fraction), []
    for source in ("python-code", "python-docs"):
        kept = (one.text for one in documents(parse_source(source)) if one.group in packages)
        found += [Item(one[:8000], subject=source) for one in itertools.islice(kept, -(-count // 2))]
    return found[:count]


def instructions(count: int, seed: int, split: conversations.Split = "value") -> list[Item]:
    """Generated questions, half of which need a tool."""
    made = conversations.generate(count, split, seed + 1)
    return [
        Item(
            example.messages[-2]["content"],
            example,
            subject=example.kind,
            messages=tuple(example.messages[:-1]),
        )
        for example in made
    ]


def said(text: str, item: Item) -> Grade:
    return {"right": float(conversations.is_right(item.answer, text))}


def problems(name: str) -> Task:
    """Held-out problems of a made task of data/problems.py; products come with the calculator."""
    meta = (
        [{"role": "system", "content": tools.meta_instruction(["Calculate"])}] if name == "products" else []
    )

    def make(count: int, seed: int) -> list[Item]:
        held_out = itertools.islice((p for p in made_problems(name) if p.held_out), count)
        return [Item(p.prompt, p, messages=(*meta, {"role": "user", "content": p.prompt})) for p in held_out]

    return Task(None, solved, "talk", made=make, max_new_tokens=128)


def solved(text: str, item: Item) -> Grade:
    return {"correct": REWARDS[item.answer.task](text, item.answer.answer)}


def scenes(count: int, seed: int, held_out: bool = False) -> list[Item]:
    """Questions about drawn scenes, those that vlm.py holds out: known pairs of colour and shape, or new
    ones."""
    rows = SceneRows(count, seed + 1 + held_out, most=2, kinds=KINDS[:-1], held_out=held_out)
    asked = ((i, *rows.make(i)[1][0]) for i in range(count))
    return [
        Item(question.text, [question.answer], subject=kind, pictures=(rows.find(str(i)),))
        for i, kind, question in asked
    ]


# ---------------------------------------------------------------- controls: a score means little without


def controls(items: list[Item]) -> dict[str, list[Item]]:
    """The same questions with other questions' pictures, and with none; with every tool switched off."""
    found = {}
    if any(item.pictures for item in items):
        partners = list(range(len(items)))
        for count in {len(item.pictures) for item in items}:  # a picture for a picture, two for two
            alike = [i for i, item in enumerate(items) if len(item.pictures) == count]
            for i, j in zip(alike, alike[1:] + alike[:1], strict=True):
                partners[i] = j
        pairs = zip(items, partners, strict=True)
        found["shuffled_pictures"] = [replace(item, pictures=items[i].pictures) for item, i in pairs]
        found["no_picture"] = [replace(item, pictures=()) for item in items]
    if any(tools_on(list(item.messages)) for item in items if item.messages):
        off = {"role": "system", "content": tools.meta_instruction(())}
        found["tools_off"] = [replace(item, messages=(off, *item.messages[1:])) for item in items]
    return found


# ---------------------------------------------------------------- the table


CODE_ENDS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")

# fmt: off
TASKS: dict[str, Task] = {
    "hellaswag": Task(hellaswag, accuracy, hub="hub/Rowan/hellaswag/data/{split}*"),
    "winogrande": Task(winogrande, accuracy, hub="hub/allenai/winogrande/winogrande_xl/{split}*"),
    "piqa": Task(piqa, accuracy, hub="hub/baber/piqa/**/*{split}*"),
    "arc_easy": Task(arc, accuracy, hub="hub/allenai/ai2_arc/ARC-Easy/{split}*", split="test"),
    "arc_challenge": Task(arc, accuracy, hub="hub/allenai/ai2_arc/ARC-Challenge/{split}*", split="test"),
    "commonsenseqa": Task(commonsenseqa, accuracy, hub="hub/tau/commonsense_qa/data/{split}*"),
    "mmlu": Task(mmlu, accuracy, hub="hub/cais/mmlu/all/{split}*", split="test", examples="dev", shots=5,
                 first=True),
    "ceval": Task(ceval, accuracy, hub="hub/ceval/ceval-exam/*/{split}*", split="val", examples="dev",
                  shots=5, first=True),
    "cmmlu": Task(cmmlu, accuracy, hub="hub/haonan-li/cmmlu/**/{split}/*", split="test", examples="dev",
                  shots=5, first=True),
    "truthfulqa_mc1": Task(truthfulqa, accuracy, hub="hub/truthfulqa/truthful_qa/multiple_choice/{split}*"),
    "truthfulqa_mc2": Task(partial(truthfulqa, targets="mc2_targets"), true_mass,
                           hub="hub/truthfulqa/truthful_qa/multiple_choice/{split}*"),
    "gsm8k": Task(gsm8k, gsm8k_grade, "write", "hub/openai/gsm8k/main/{split}*", "test", shots=5,
                  stop=("Question:", "</s>", "<|im_end|>")),
    "math": Task(mathematics, math_grade, "write", "hub/EleutherAI/hendrycks_math/*/{split}*", "test",
                 shots=4, stop=("Problem:",), max_new_tokens=1024),
    "math500": Task(competition, math_grade, "write", "hub/HuggingFaceH4/MATH-500/{split}*", "test",
                    max_new_tokens=4096),
    "amc23": Task(competition, math_grade, "write", "hub/math-ai/amc23/**/{split}*", "test",
                  max_new_tokens=4096),
    "minerva": Task(competition, math_grade, "write", "hub/math-ai/minervamath/**/{split}*", "test",
                    max_new_tokens=4096),
    "olympiadbench": Task(competition, math_grade, "write", "hub/math-ai/olympiadbench/**/{split}*", "test",
                          max_new_tokens=4096),
    "bbh": Task(bbh, bbh_grade, "write", "hub/SaylorTwift/bbh/*/{split}*", "test", "test", first=True,
                stop=("</s>", "Q", "\n\n"), max_new_tokens=1024),
    "popqa": Task(popqa, popqa_grade, "write", "hub/akariasai/PopQA/{split}*", "test", "test", shots=15,
                  stop=("\n",), max_new_tokens=20),
    "humaneval": Task(humaneval, passed, "code", "hub/openai/openai_humaneval/**/{split}*", "test",
                      stop=CODE_ENDS, max_new_tokens=1024),
    "humaneval_plus": Task(humaneval, passed, "code", "hub/evalplus/humanevalplus/**/{split}*", "test",
                           stop=CODE_ENDS, max_new_tokens=1024),
    # Pictures: files of {image, question, answer}, made from each data set's own (docs/eval.md).
    "gqa": Task(picture, exact, "look", max_new_tokens=16),
    "tallyqa": Task(picture, exact, "look", max_new_tokens=16),
    "vsr": Task(picture, exact, "look", max_new_tokens=16),
    "vizwiz": Task(picture, vqa, "look", max_new_tokens=16),
    "pope": Task(picture, pope, "look", max_new_tokens=16),
    "refcoco_plus": Task(picture, box, "look", max_new_tokens=48),
    "ocid_ref": Task(picture, box, "look", max_new_tokens=48),
    "picture_options": Task(picture, accuracy, "look_options"),
    # Made on the spot; `bpb` takes any text as well.
    "bpb": Task(text, bits, "text", made=held_out_texts),
    "instructions": Task(None, said, "talk", made=instructions),
    "instructions_reworded": Task(None, said, "talk", made=partial(instructions, split="template")),
    **{name: problems(name) for name in PROBLEMS},
    "scenes": Task(None, exact, "look", made=scenes, max_new_tokens=16),
    "scenes_new_pairs": Task(None, exact, "look", made=partial(scenes, held_out=True), max_new_tokens=16),
}
# fmt: on

# What the papers' tables ask, as NAME@SHOTS. Moxin (arXiv 2412.06845): tables 3, 4, 6, 7, 8; the shots of its
# chain-of-thought table are not stated there, these are the Tulu 3 suite's. MOSS: shots of the published
# third-party figures.
SUITES: dict[str, tuple[str, ...]] = {
    "moxin-zero-shot": ("hellaswag@0", "winogrande@0", "piqa@0", "arc_easy@0", "arc_challenge@0"),
    "moxin-few-shot": ("arc_challenge@25", "hellaswag@10", "mmlu@5", "winogrande@5"),
    "moxin-cot": (
        "gsm8k@8", "math@4", "humaneval@0", "humaneval_plus@0", "mmlu@0", "popqa@15", "bbh@3",
        "truthfulqa_mc2@0",
    ),
    "moxin-reasoning": ("math500@0", "amc23@0", "minerva@0", "olympiadbench@0"),
    "moss": ("ceval@5", "cmmlu@5"),
    "vlm": ("gqa", "vizwiz", "refcoco_plus", "ocid_ref", "vsr", "pope", "tallyqa"),
    "made": ("bpb", "instructions", "instructions_reworded", "arithmetic", "sorting", "steps", "countdown"),
}  # fmt: skip
