"""Was the test in the training text? Items of which 13 words in a row also stand in a corpus.

The rule of GPT-3 (arXiv 2005.14165, appendix C) with the words and hashes of data/filters.py, which can keep
such documents out of training to begin with. A found item is not proof of cheating (quotations are found too)
and a rephrased one is missed; so the score is also given for the clean items alone.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from data.filters import NGRAM, hash_words, ngram_hashes, words_of
from data.sources import BadRecord, documents, parse_source
from data.text import Corpus
from data.tokenizer import load_tokenizer


def corpus_texts(place: str) -> Iterator[str]:
    """Training text: of a prepared folder (manifest.json) what was really trained on, else of a source like
    those of --data."""
    if not (Path(place) / "manifest.json").is_file():
        for document in documents(parse_source(place)):
            if isinstance(document, BadRecord):
                raise document
            yield document.text
        return
    tokenizer = load_tokenizer(place)
    for stream in Corpus(place, tokenizer).train.values():
        for start, length in zip(stream.starts, stream.lengths, strict=True):
            yield tokenizer.decode(stream.tokens[start : start + length].tolist())


def contaminated(texts: list[str], corpus: Iterable[str]) -> list[bool | None]:
    """For each text whether a run of 13 of its words is in the corpus; None if it has fewer words."""
    grams = []
    for text in texts:
        words = words_of(text)
        grams.append(set(ngram_hashes(hash_words(words), NGRAM).tolist()) if len(words) >= NGRAM else set())
    wanted = np.array(sorted(set().union(*grams)), dtype=np.uint64)
    found: set[int] = set()
    for document in corpus:
        hashes = ngram_hashes(hash_words(words_of(document)), NGRAM)
        found.update(hashes[np.isin(hashes, wanted)].tolist())
    return [bool(own & found) if own else None for own in grams]
