"""Byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909): learn merges, apply merges.

A vocabulary is `ranks`: token bytes -> id, in the order the merges were learned. Encoding joins the
neighbours whose result was learned first, until no two neighbours make a token.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise

import regex

from core.config import UserError


def count_words(texts: Iterable[str], pattern: str) -> Counter[str]:
    """How often each word occurs: there are ten to a hundred times fewer distinct words than words."""
    find, counts = regex.compile(pattern).findall, Counter()
    for text in texts:
        counts.update(find(text))
    return counts


def learn_merges(
    words: list[list[int]],
    counts: list[int],
    names: dict[int, bytes],
    first_id: int,
    n_merges: int,
    whole_start: bool = False,
) -> None:
    """Add up to n_merges tokens to `names` (id -> bytes), each joining the then most frequent neighbours.

    words: token ids of each distinct word, altered in place; counts: how often each word occurs.
    whole_start: only tokens that begin where a character begins.
    Ties go to the pair with the smaller ids, so the result depends on the counts alone. Stops early when no
    pair occurs twice. The pair counts are kept up to date instead of counted anew, and only words with the
    pair are touched; the heap may hold old, too high counts, which are put right when they come to the top.
    """
    pair_counts: dict[tuple[int, int], int] = defaultdict(int)
    words_with: dict[tuple[int, int], set[int]] = defaultdict(set)
    for index, word in enumerate(words):
        for pair in pairwise(word):
            pair_counts[pair] += counts[index]
            words_with[pair].add(index)

    def wanted(pair: tuple[int, int]) -> bool:
        return not whole_start or names[pair[0]][0] >> 6 != 0b10  # a UTF-8 continuation byte

    heap = [(-count, pair) for pair, count in pair_counts.items() if wanted(pair)]
    heapq.heapify(heap)
    new_id = first_id
    while heap and new_id < first_id + n_merges:
        negative_count, pair = heapq.heappop(heap)
        count = pair_counts.get(pair, 0)
        if count != -negative_count:
            if count > 0:
                heapq.heappush(heap, (-count, pair))
            continue
        if count < 2:
            break
        left, right = pair
        names[new_id] = names[left] + names[right]
        change: dict[tuple[int, int], int] = defaultdict(int)
        for index in words_with.pop(pair):
            word, n, start = words[index], counts[index], 0
            while left in word[start:-1]:
                i = word.index(left, start)
                start = i + 1
                if word[start] != right:
                    continue
                if i > 0:
                    change[word[i - 1], left] -= n
                    change[word[i - 1], new_id] += n
                    words_with[word[i - 1], new_id].add(index)
                if i + 2 < len(word):
                    change[right, word[i + 2]] -= n
                    change[new_id, word[i + 2]] += n
                    words_with[new_id, word[i + 2]].add(index)
                word[i : i + 2] = [new_id]
        del pair_counts[pair]
        change.pop(pair, None)
        for other, difference in change.items():
            pair_counts[other] += difference
            if difference > 0 and wanted(other):
                heapq.heappush(heap, (-pair_counts[other], other))
        new_id += 1


def apply_merges(content: bytes, ranks: dict[bytes, int], before: float = float("inf")) -> list[bytes]:
    """Byte-pair encoding of one word as plain Python: join the neighbours with the lowest id, leftmost
    first, until none is left. With `before`, only tokens of a lower id are made."""
    parts = [content[i : i + 1] for i in range(len(content))]
    while len(parts) > 1:
        ids = [ranks.get(left + right, before) for left, right in pairwise(parts)]
        first = ids.index(min(ids))
        if ids[first] >= before:
            break
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts


def merges_of(ranks: dict[bytes, int]) -> list[list[bytes]]:
    """The merge behind each token of more than one byte: the two parts that earlier merges leave of it."""
    merges = [
        apply_merges(token, ranks, before=token_id) for token, token_id in ranks.items() if len(token) > 1
    ]
    broken = next((parts for parts in merges if len(parts) != 2), None)
    if broken:
        raise UserError(
            f"token {b''.join(broken)!r} is not made of two earlier tokens; the vocabulary is damaged"
        )
    return merges
