"""Questions and captions about drawn scenes, in English and Chinese, with exact answers.

The default data of the vision stage: `core.scenes` draws what it describes, so every answer is known. Some
pairs of colour and shape never occur in training; questions about them test whether the two were learned
apart.

    python data/scene_rows.py [COUNT]        prints some
"""

import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a file: import from the repository, not from data/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from core.scenes import COLOURS, POSITIONS, SHAPES, SIZES, Item, Language, Scene, describe, draw, random_scene
from core.towers import one_letter
from data.pictures import IMAGE, Rows, Source

HELD_OUT = {("purple", "star"), ("yellow", "triangle"), ("black", "circle")}  # never in training
CHINESE = COLOURS | SHAPES | SIZES | POSITIONS | {"above": "上面", "below": "下面"}
CHINESE_WORDS = re.compile(f"({'|'.join(sorted(set(CHINESE.values()), key=len, reverse=True))})")
KINDS = ("colour", "shape", "size", "position", "count", "exist", "relation", "digit", "letter", "caption")
TIMES = {"position": 2, "relation": 4}  # tries in a conversation, the rest once: what is learnt last


@dataclass(frozen=True)
class Question:
    """Something asked about a scene; `about` are the (colour, shape) pairs that it speaks of."""

    text: str
    answer: str
    about: frozenset[tuple[str, str]] = frozenset()


class Asker:
    """Questions about one scene in one language. Each method is a kind; None where the scene does not allow
    it."""

    def __init__(self, scene: Scene, language: Language, rng: random.Random) -> None:
        self.scene, self.language, self.rng = scene, language, rng
        self.shapes = [item for item in scene.items if item.shape != "text"]

    def say(self, english: str, chinese: str) -> str:
        return english if self.language == "en" else chinese

    def word(self, name: str) -> str:
        return name if self.language == "en" else CHINESE[name]

    def thing(self, colour: str = "", shape: str = "") -> str:
        """'red star', 'red thing', 'star', 'thing'."""
        if self.language == "en":
            return f"{colour} {shape or 'thing'}".strip()
        return (colour and CHINESE[colour]) + (CHINESE[shape] if shape else "东西")

    def number(self, colour: str = "", shape: str = "") -> int:
        """How many things there are of that colour and that shape."""
        things = self.scene.items
        return sum(colour in ("", thing.colour) and shape in ("", thing.shape) for thing in things)

    def only(self, *fields: str) -> Item | None:
        """One of the shapes whose fields (colour, shape) no other thing has."""
        keys = [tuple(getattr(item, field) for field in fields) for item in self.scene.items]
        single = [item for item in self.shapes if keys.count(tuple(getattr(item, f) for f in fields)) == 1]
        return self.rng.choice(single) if single else None

    def named(self) -> tuple[Item, str] | None:
        """One of the shapes and what no other thing is called: 'red star', 'red thing' or 'star'."""
        fields = self.rng.choice([("colour", "shape"), ("colour",), ("shape",)])
        item = self.only(*fields)
        return item and (item, self.thing(**{field: getattr(item, field) for field in fields}))

    def colour(self) -> Question | None:
        if item := self.only("shape"):
            text = self.say(f"What colour is the {item.shape}?", f"{CHINESE[item.shape]}是什么颜色？")
            return Question(text, self.word(item.colour), pairs(item))
        return None

    def shape(self) -> Question | None:
        if item := self.only("colour"):
            text = self.say(f"Which shape is {item.colour}?", f"{CHINESE[item.colour]}的是什么形状？")
            return Question(text, self.word(item.shape), pairs(item))
        return None

    def size(self) -> Question | None:
        if named := self.named():
            item, thing = named
            text = self.say(f"Is the {thing} small or large?", f"{thing}是大还是小？")
            return Question(text, self.word(item.size), pairs(item))
        return None

    def position(self) -> Question | None:
        if named := self.named():
            item, thing = named
            return Question(
                self.say(f"Where is the {thing}?", f"{thing}在哪里？"), self.word(item.position), pairs(item)
            )
        return None

    def count(self) -> Question:
        """Of all things, or of those of a colour, a shape or both, mostly such as are there."""
        choose, present = self.rng.choice, pairs(*self.shapes)
        colour = choose([choose([item.colour for item in self.scene.items]), choose(list(COLOURS))])
        shape = choose([choose([item.shape for item in self.shapes] or [""]), choose(list(SHAPES))])
        colour, shape = choose([("", ""), (colour, ""), ("", shape), (colour, shape)])
        if (colour, shape) in HELD_OUT and not present & HELD_OUT:
            colour = ""
        name, number = self.thing(colour, shape), str(self.number(colour, shape))
        about = frozenset({(colour, shape)} if colour and shape else ())
        return Question(self.say(f"How many {name}s are there?", f"有几个{name}？"), number, about)

    def exist(self) -> Question | None:
        """Half yes, half no. Half ask for a colour or a shape, half for both; where those are not there, each
        of the two is, if it can be, on different things (POPE's adversarial questions)."""
        present = pairs(*self.shapes)
        if not present:
            return None
        yes, both = self.rng.random() < 0.5, self.rng.random() < 0.5
        new, rest = present & HELD_OUT, {(c, s) for c in COLOURS for s in SHAPES} - HELD_OUT - present
        swapped = rest & {(colour, shape) for colour, _ in present for _, shape in present}
        near = {(c, s) for c, s in rest if any((c == a) != (s == b) for a, b in present)}
        words = {(colour, "") for colour in COLOURS} | {("", shape) for shape in SHAPES}
        asked = {word for word in words if (self.number(*word) > 0) == yes}
        if new:
            asked = new if yes else HELD_OUT - present
        elif both or not asked:
            asked = present if yes else swapped or near
        pair = self.rng.choice(sorted(asked))
        text = self.say(f"Is there a {self.thing(*pair)}?", f"有没有{self.thing(*pair)}？")
        about = frozenset({pair} if all(pair) else ())
        return Question(text, self.say("yes", "有") if yes else self.say("no", "没有"), about)

    def relation(self) -> Question | None:
        """On which side of one thing another is."""
        one, other = self.named(), self.named()
        if one is None or other is None or one[0] == other[0]:
            return None
        (first, a), (second, b) = one, other
        down, right = (a - b for a, b in zip(cell(first), cell(second), strict=True))
        sides = [("left", "right", right)] * (right != 0) + [("above", "below", down)] * (down != 0)
        less, more, way = self.rng.choice(sides)
        english = f"Is the {a} {less} or {more} {'of ' if less == 'left' else ''}the {b}?"
        chinese = f"{a}在{b}的{CHINESE[less]}还是{CHINESE[more]}？"
        return Question(
            self.say(english, chinese), self.word(more if way > 0 else less), pairs(first, second)
        )

    def text(self, digits: bool, question: str) -> Question | None:
        texts = [
            item.text for item in self.scene.items if item.shape == "text" and item.text.isdigit() == digits
        ]
        return Question(question, texts[0]) if len(texts) == 1 else None

    def digit(self) -> Question | None:
        return self.text(True, self.say("Which digit is written?", "写的是什么数字？"))

    def letter(self) -> Question | None:
        return self.text(False, self.say("Which letter is written?", "写的是什么字母？"))

    def caption(self) -> Question:
        text = self.say("Describe the picture.", "描述这张图片。")
        return Question(text, describe(self.scene, self.language), pairs(*self.shapes))


def pairs(*items: Item) -> frozenset[tuple[str, str]]:
    return frozenset((item.colour, item.shape) for item in items)


def cell(item: Item) -> tuple[int, int]:
    """(row, column) of the 3 x 3 grid."""
    return divmod(list(POSITIONS).index(item.position), 3)


def words_apart(text: str) -> list[str]:
    """The text in pieces, each Chinese word of the scene language one of its own.

    A tokenizer trained on them has no token that spans two words: 紫色五角星 is a colour and a shape to the
    model, as "purple star" is.
    """
    return [piece for piece in CHINESE_WORDS.split(text) if piece]


class SceneRows(Rows):
    """Drawn scenes with `turns` questions each, made when they are asked for.

    Row i is about scene i % scenes, which depends on (seed, i % scenes) alone; its questions depend on
    (seed, i). So `askings` rows share a picture but not its questions: pictures are dear, and a model that
    meets a question again learns its answer by heart.

    The first question goes round the kinds, so that every kind is equally frequent; scenes are drawn until
    one allows it. `held_out` scenes have a pair of colour and shape that the others never show, and the first
    question speaks of it wherever its kind can.
    """

    def __init__(
        self,
        scenes: int,
        seed: int = 0,
        most: int = 3,
        size: int = 96,
        turns: int = 1,
        kinds: tuple[str, ...] = KINDS,
        held_out: bool = False,
        languages: tuple[Language, ...] = ("en", "zh"),
        askings: int = 1,
    ) -> None:
        super().__init__(scenes * askings, seed)
        self.scenes, self.most, self.size, self.turns = scenes, most, size, turns
        self.kinds, self.held_out, self.languages = kinds, held_out, languages

    def scene(self, i: int) -> Scene:
        rng = random.Random(f"{self.seed}/{self.shown_by(i)}")
        while True:
            scene = one_letter(random_scene(rng, rng.randint(1, self.most), text_share=0.25))
            allowed = bool(pairs(*scene.items) & HELD_OUT) == self.held_out
            if allowed and self.fits(i, getattr(Asker(scene, "en", rng), self.kind(i))()):
                return scene

    def fits(self, i: int, question: Question | None) -> bool:
        """As the first question of row i."""
        of_new = self.held_out and self.kind(i) not in ("digit", "letter")
        return question is not None and (not of_new or bool(question.about & HELD_OUT))

    def make(self, i: int) -> tuple[Scene, list[tuple[str, Question]]]:
        """Row i's scene and its (kind, question) pairs."""
        scene, rng = self.scene(i), random.Random(f"{self.seed}/{i}/questions")
        asker, first = Asker(scene, rng.choice(self.languages), rng), None
        while not self.fits(i, first):  # it was possible once
            first = getattr(asker, self.kind(i))()
        questions = {first.text: (self.kind(i), first)}
        done = ("caption", self.kind(i))  # a caption outweighs all the others
        others = [kind for kind in self.kinds if kind in TIMES or kind not in done]
        others = [kind for kind in others for _ in range(TIMES.get(kind, 1))]
        for other in rng.sample(others, len(others)):
            if len(questions) < self.turns and (question := getattr(asker, other)()):
                questions.setdefault(question.text, (other, question))
        return scene, list(questions.values())

    def record(self, i: int) -> Any:
        """As a row of a LLaVA file."""
        turns = []
        for _, question in self.make(i)[1]:
            turns += [{"from": "human", "value": question.text}, {"from": "gpt", "value": question.answer}]
        turns[0]["value"] = f"{IMAGE}\n{turns[0]['value']}"
        return {"image": str(i), "conversations": turns}

    def find(self, name: str) -> Source:
        return lambda: draw(self.scene(int(name)), self.size)

    def shown_by(self, i: int) -> int:
        return i % self.scenes

    def kind(self, i: int) -> str:
        return self.kinds[self.shown_by(i) % len(self.kinds)]

    def fingerprint(self) -> list[Any]:
        return [
            self.seed,
            self.scenes,
            self.length,
            self.most,
            self.size,
            self.turns,
            self.kinds,
            self.held_out,
            self.languages,
        ]

    def where(self, i: int) -> str:
        return f"scene {self.shown_by(i)} of seed {self.seed}"


if __name__ == "__main__":
    rows = SceneRows(int(sys.argv[1]) if len(sys.argv) > 1 else 10, turns=3)
    for i in range(len(rows)):
        scene, questions = rows.make(i)
        print(describe(scene))
        for kind, question in questions:
            print(f"  {kind}: {question.text} {question.answer}")
