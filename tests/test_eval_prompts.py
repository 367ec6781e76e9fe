"""Prompts of every option task and of GSM8K, with drawn examples, against lm-eval's own task files."""

import json
from pathlib import Path
from typing import Any

import pytest

from data.task_rows import items_of, with_examples
from data.tasks import TASKS

COUNT = 12
CHINESE = dict(A="甲", B="乙", C="丙", D="丁")
TRUTH = {"choices": ["a", "b"], "labels": [1, 0]}
# task: lm-eval's file, split asked, split of the examples, made row number i
FILES: dict[str, tuple[str, str, str, Any]] = {
    "hellaswag": ("hellaswag/hellaswag", "validation", "train", lambda i: {
        "activity_label": f"Act {i}", "ctx_a": f"A man [title] does {i}.", "ctx_b": "then he",
        "endings": [f"eats [step] {i}  soup.", "runs.", "sits [a].", "x"], "label": str(i % 4)}),
    "winogrande": ("winogrande/default", "validation", "train", lambda i: {
        "sentence": f"The cup {i} did not fit because the _ was too large.", "option1": "cup",
        "option2": "box", "answer": str(i % 2 + 1)}),
    "piqa": ("piqa/piqa", "validation", "train", lambda i: {
        "goal": f"g{i}", "sol1": f"a{i}", "sol2": f"b{i}", "label": i % 2}),
    "arc_challenge": ("arc/arc_challenge", "test", "train", lambda i: {
        "question": f"q{i}", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "12"[i % 2]}),
    "commonsenseqa": ("commonsense_qa/default", "validation", "train", lambda i: {
        "question": f"q{i} ", "choices": {"text": list("abcde"), "label": list("ABCDE")},
        "answerKey": "ABCDE"[i % 5]}),
    "mmlu": ("mmlu/default/mmlu_high_school_us_history", "test", "dev", lambda i: {
        "question": f" q{i} ", "choices": list("pqrs"), "answer": i % 4,
        "subject": "high_school_us_history"}),
    "ceval": ("ceval/ceval-valid_law", "val", "dev", lambda i: {
        "question": f"q{i}", **CHINESE, "answer": "ABCD"[i % 4], "subject": "law"}),
    "cmmlu": ("cmmlu/cmmlu_nutrition", "test", "dev", lambda i: {
        "Question": f"q{i}", **CHINESE, "Answer": "ABCD"[i % 4], "subject": "nutrition"}),
    "truthfulqa_mc1": ("truthfulqa/truthfulqa_mc1", "validation", "", lambda i: {
        "question": f"q{i}", "mc1_targets": TRUTH, "mc2_targets": TRUTH}),
    "gsm8k": ("gsm8k/gsm8k", "test", "train", lambda i: {
        "question": f"q{i}", "answer": f"so #### {i}"}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("same", [False, True], ids=["own file", "same file"])
@pytest.mark.parametrize("name", FILES)
def test_prompts(name: str, same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples from a file of their own, or from the questions themselves."""
    lm_eval = pytest.importorskip("lm_eval", reason="the referee is not installed: lm_eval 0.4.13, datasets")
    from lm_eval.tasks import get_task_dict
    from lm_eval.tasks._yaml_loader import load_yaml

    file, split, examples, make = FILES[name]
    shots = 3 if examples else 0
    rows = [make(i) for i in range(COUNT)]
    paths = {split: tmp_path / "asked.jsonl", examples: tmp_path / "examples.jsonl"}
    for path, part in zip(paths.values(), (rows, rows[::-1]), strict=True):
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part))
    source = split if same else examples

    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / f"{file}.yaml")
    for key in ("dataset_name", "tag", "training_split", "validation_split", "fewshot_split"):
        config.pop(key, None)
    files = {split: str(paths[split])} | ({source: str(paths[source])} if shots else {})
    kept = {"cache_dir": str(tmp_path / "cache"), "data_files": files}
    config |= {"dataset_path": "json", "dataset_kwargs": kept, "num_fewshot": shots, "test_split": split}
    (task,) = get_task_dict([config | ({"fewshot_split": source} if shots else {})]).values()
    task.set_fewshot_seed(1234)
    task.build_all_requests()
    theirs = [
        instance.args[:2] if task.OUTPUT_TYPE == "multiple_choice" else instance.args[:1]
        for instance in task.instances
    ]

    ours = TASKS[name]
    items = items_of(ours, name, str(paths[split]), split)
    pool = items if same else items_of(ours, name, str(paths[examples]), examples) if shots else []
    asked = []
    for item, head in zip(items, with_examples(items, pool, shots, ours.first, same), strict=True):
        prompts = item.prompts or [item.prompt] * max(1, len(item.options))
        pairs = zip(prompts, [f" {option}" for option in item.options] or [None], strict=True)
        asked += [(head + prompt,) + ((option,) if option else ()) for prompt, option in pairs]
    assert asked == theirs
