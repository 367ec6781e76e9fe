"""Tokenizer training and encoding against `tokenizers`: installed Python source, the same word pattern.

    python benchmarks/tokenizer.py [--megabytes 30] [--vocab_size 32000]

CPU seconds of one process with one thread. The two trainers count the same pairs and break ties differently,
so that nearly all merged strings are equal; how many is in the table, and so are the tokens each makes of new
text.
"""

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["RAYON_NUM_THREADS"] = "1"  # read when the library is loaded

import tokenizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer

from data.sources import documents, parse_source
from data.tokenizer import PATTERN, SPECIAL_TOKENS, train_tokenizer
from data.tokenizer_files import to_bytes


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    result = work()
    return result, time.process_time() - start


def train_theirs(texts: list[str], vocab_size: int) -> tokenizers.Tokenizer:
    theirs = tokenizers.Tokenizer(BPE())
    split = Split(tokenizers.Regex(PATTERN), "isolated")
    theirs.pre_tokenizer = Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=ByteLevel.alphabet(),
    )
    theirs.train_from_iterator(texts, trainer)
    return theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=30)
    parser.add_argument("--vocab_size", type=int, default=32_000)
    options = parser.parse_args()
    stream = (document.text for document in documents(parse_source("python-code")))
    texts, size = [], 0
    while size < options.megabytes * 1e6:
        texts.append(next(stream))
        size += len(texts[-1].encode())
    fresh = list(islice(stream, 200))

    ours, our_seconds = timed(lambda: train_tokenizer(texts, options.vocab_size))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    theirs, their_seconds = timed(lambda: train_theirs(texts, options.vocab_size))
    their_strings = {to_bytes(token) for token in theirs.get_vocab() if token not in SPECIAL_TOKENS}
    equal = len(their_strings & set(ours.ranks))

    our_ids, our_encoding = timed(lambda: [ours.encode(text) for text in fresh])
    their_ids, their_encoding = timed(lambda: [theirs.encode(text).ids for text in fresh])
    fresh_size = sum(len(text.encode()) for text in fresh)
    print(
        f"{size / 1e6:.1f} MB in {len(texts)} files, {options.vocab_size} ids, new {fresh_size / 1e6:.1f} MB"
    )
    print(f"{'':28}{'ours':>12}{'tokenizers':>12}{'ratio':>8}")
    rows = (
        ("training, CPU s", our_seconds, their_seconds),
        ("encoding, MB per CPU s", fresh_size / 1e6 / our_encoding, fresh_size / 1e6 / their_encoding),
        ("tokens of new text", sum(map(len, our_ids)), sum(map(len, their_ids))),
    )
    for name, mine, other in rows:
        print(f"{name:28}{mine:>12,.2f}{other:>12,.2f}{mine / other:>8.2f}")
    print(f"merged strings in both: {equal:,} of {len(ours.ranks):,}; our peak memory {peak / 1e6:.0f} MB")
    print(json.dumps({"train_ratio": our_seconds / their_seconds, "equal": equal / len(ours.ranks)}))


if __name__ == "__main__":
    main()
