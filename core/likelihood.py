"""How probable are these continuations? Asked for many at once, with everything they share computed once.

    log p(continuation | context) = sum_t log p(c_t | context, c_<t)

A benchmark asks the same few-shot examples thousands of times, and each question once an option. Here a
question is read in up to three pieces, each on top of what was read before: the examples that a family of
questions begins with, the question, and the options behind it. Later pieces attend to the keys and values of
the earlier ones, so the sums are those of reading every option whole (tests hold them to it).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import attention, make_bounds
from model import Config, Transformer

NOWHERE = 1 << 30  # position of padding: later than any real one, so that nobody sees it
FAMILY = 32  # tokens in common that are worth a piece of their own
LOGIT_ROWS = 1024  # predictions whose logits are in memory at a time


@dataclass(frozen=True)
class Request:
    """Token ids read, and the last `count` predictions asked for: of `targets`, one for each of the last
    inputs."""

    inputs: list[int]
    targets: list[int]


def make_request(context: list[int], continuation: list[int], longest: int) -> Request:
    """Of a context that is too long, the end is kept: `longest` inputs at most."""
    whole = (context + continuation)[-(longest + 1) :]
    return Request(whole[:-1], continuation[-len(whole) + 1 :])


def rolling_requests(tokens: list[int], first: int, longest: int) -> list[Request]:
    """A text of any length, each of its tokens predicted once, in windows of `longest`.

    `first` stands before the text. A window begins with the token before it; the last, which predicts fewer,
    sees as much context as fits (the windows of lm-eval, so that the sums are the same).
    """
    history, requests = [first, *tokens], []
    for start in range(0, len(tokens), longest):
        end = min(start + longest, len(tokens))
        requests.append(Request(history[max(0, end - longest) : end], tokens[start:end]))
    return requests


class Reading:
    """One forward over new tokens [n, T] on top of what was read: a cache in the sense of
    `Transformer.hidden_states`. Afterwards it holds the keys and values of both, if asked to `keep` them."""

    def __init__(
        self, positions: Tensor, config: Config, past: "Reading | None", rows: Tensor, keep: bool
    ) -> None:
        """rows [n]: which row of `past` each new row continues."""
        self.past, self.rows, self.keep, window = past, rows, keep, config.sliding_window
        self.layers: list[tuple[Tensor, Tensor]] = []  # k, v [n, S, KV, D]
        if past is None:  # padding comes last, where causal order hides it
            self.positions, length = positions, positions.shape[1]
            self.bounds = make_bounds(length, window, device=positions.device) if window else None
            return
        self.positions = torch.cat((past.positions[rows], positions), 1)
        distance = positions[:, :, None] - self.positions[:, None, :]  # [n, T, S]
        visible = (distance >= 0) & (distance < window) if window else distance >= 0
        self.mask = visible[:, None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.past is not None:
            known = self.past.layers[layer]
            k, v = (torch.cat((old[self.rows], new), 1) for old, new in zip(known, (k, v), strict=True))
        if self.keep:
            self.layers.append((k, v))
        if self.past is None:
            return attention(q, k, v, self.bounds)
        grouped = q.shape[2] != k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, self.mask, enable_gqa=grouped).transpose(1, 2)


def read(
    model: Transformer,
    pieces: Sequence[list[int]],
    past: Reading | None,
    rows: Sequence[int],
    keep: bool,
    **pictures: Tensor,
) -> tuple[Tensor, Reading]:
    """Hidden states [n, T, dim] of token lists padded on the right; row i continues row rows[i] of `past`."""
    device = model.embed.weight.device
    lengths = torch.tensor([len(piece) for piece in pieces])
    width = max(1, int(lengths.max()))  # options may differ from their first token on: then nothing is shared
    tokens = torch.zeros(len(pieces), width, dtype=torch.long)
    for row, piece in enumerate(pieces):
        tokens[row, : len(piece)] = torch.tensor(piece)
    steps = torch.arange(tokens.shape[1]).expand_as(tokens)
    padding = steps >= lengths[:, None]
    chosen = torch.tensor(rows, device=device)
    if past is not None:
        begun = (past.positions < NOWHERE).sum(1)[chosen].cpu()
        steps = steps + begun[:, None]
    positions = steps.masked_fill(padding, NOWHERE).to(device)
    reading = Reading(positions, model.config, past, chosen, keep)
    return model.hidden_states(tokens.to(device), positions=positions, cache=reading, **pictures), reading


@dataclass
class Family:
    """Questions that begin with the same `shared` tokens. A question is a list of requests, each with the
    number of its sum."""

    shared: list[int]
    questions: list[list[tuple[int, Request]]]


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of leading tokens that two lists have in common."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))


def families(questions: list[list[tuple[int, Request]]]) -> list[Family]:
    """Neighbours in the order of their tokens, as long as they share FAMILY tokens; the others together."""
    ordered = sorted(questions, key=lambda question: question[0][1].inputs)
    groups, alone = [ordered[:1]], Family([], [])
    for before, question in pairwise(ordered):
        if common(before[0][1].inputs, question[0][1].inputs) >= FAMILY:
            groups[-1].append(question)
        else:
            groups.append([question])
    found = []
    for group in groups:
        if len(group) < 4:
            alone.questions += group
            continue
        first = group[0][0][1].inputs
        # Not a position that something is asked of: predictions are taken from the later pieces.
        length = min(
            min(common(first, request.inputs), len(request.inputs) - len(request.targets))
            for question in group
            for _, request in question
        )
        found.append(Family(first[:length], group))
    return [*found, alone] if alone.questions else found


@torch.inference_mode()
def score(
    model: Transformer,
    questions: Sequence[Sequence[Request]],
    batch_tokens: int = 8192,
    features: Sequence[Tensor | None] = (),
) -> list[list[float]]:
    """log p of each request's targets, in nats, [question][request].

    batch_tokens: about how many tokens, padding included, go through the model at a time. features: of each
    question, [pictures, patches, dim] of the pictures (PATCH) that all its options begin with, or None.
    """
    numbers = iter(range(sum(map(len, questions))))
    numbered = [[(next(numbers), request) for request in question] for question in questions]
    sums = torch.zeros(sum(map(len, questions)), dtype=torch.float64)
    pairs = zip(numbered, features, strict=bool(features))
    seen = {question[0][0]: one for question, one in pairs if one is not None}
    # Two pictures look alike as tokens, so questions about pictures share nothing.
    groups = [Family([], numbered)] if seen else families(numbered) if numbered else []
    for family in groups:
        past = read(model, [family.shared], None, [0], keep=True)[1] if family.shared else None
        for batch in batches(family, batch_tokens):
            shown = [seen[question[0][0]] for question in batch if question[0][0] in seen]
            pictures = {"features": torch.cat(shown)} if shown else {}
            add_scores(model, batch, len(family.shared), past, batch_tokens, sums, **pictures)
    return [[sums[number].item() for number, _ in question] for question in numbered]


def batches(family: Family, batch_tokens: int) -> Iterator[list[list[tuple[int, Request]]]]:
    """Questions of like length, so that little is padded."""
    batch: list[list[tuple[int, Request]]] = []
    for question in sorted(family.questions, key=lambda question: -len(question[0][1].inputs)):
        longest = len((batch or [question])[0][0][1].inputs)
        if batch and (len(batch) + 1) * longest > batch_tokens:
            yield batch
            batch = []
        batch.append(question)
    yield batch


def add_scores(
    model: Transformer,
    batch: list[list[tuple[int, Request]]],
    start: int,
    past: Reading | None,
    batch_tokens: int,
    sums: Tensor,
    **pictures: Tensor,
) -> None:
    """Read the questions, then what is left of their options, and add up the options' log-probabilities.

    start: tokens that `past` has read already.
    """
    stems, rest = [], []  # ends of the questions' shared tokens; (row, number, request) of unfinished options
    for row, question in enumerate(batch):
        first = question[0][1].inputs
        stems.append(min(common(first, request.inputs) for _, request in question))
        rest += [(row, n, request) for n, request in question if len(request.inputs) > stems[-1]]
    pieces = [question[0][1].inputs[start:stem] for question, stem in zip(batch, stems, strict=True)]
    hidden, reading = read(model, pieces, past, [0] * len(batch), bool(rest), **pictures)
    asked = [(row, n, request, start, stems[row]) for row, q in enumerate(batch) for n, request in q]
    add_predictions(model, hidden, asked, sums)
    rest.sort(key=lambda option: -len(option[2].inputs))
    at_once = max(1, batch_tokens // len(rest[0][2].inputs)) if rest else 1
    for begin in range(0, len(rest), at_once):
        part = rest[begin : begin + at_once]
        tails = [request.inputs[stems[row] :] for row, _, request in part]
        hidden, _ = read(model, tails, reading, [row for row, _, _ in part], keep=False)
        asked = [(i, n, r, stems[row], len(r.inputs)) for i, (row, n, r) in enumerate(part)]
        add_predictions(model, hidden, asked, sums)


def add_predictions(
    model: Transformer, hidden: Tensor, asked: list[tuple[int, int, Request, int, int]], sums: Tensor
) -> None:
    """Add the predictions made at positions begin..end: hidden [n, T, dim] has those of row's `begin` first.

    asked: (row, number of the sum, request, begin, end). Logits are made for asked positions only.
    """
    rows, places, targets, owners = [], [], [], []
    for row, number, request, begin, end in asked:
        offset = len(request.inputs) - len(request.targets)  # the position that predicts the first target
        for position in range(max(begin, offset), min(end, len(request.inputs))):
            rows.append(row)
            places.append(position - begin)
            targets.append(request.targets[position - offset])
            owners.append(number)
    if not rows:
        return
    picked = hidden[torch.tensor(rows), torch.tensor(places)]
    wanted = torch.tensor(targets, device=hidden.device)[:, None]
    parts = zip(picked.split(LOGIT_ROWS), wanted.split(LOGIT_ROWS), strict=True)
    found = torch.cat([model.head(x).float().log_softmax(-1).gather(-1, y) for x, y in parts])
    sums.index_add_(0, torch.tensor(owners), found.squeeze(-1).double().cpu())
