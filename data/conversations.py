"""Generated conversations in English and Chinese: the data that `sft.py` learns from when it is given none.

Each question needs one skill: small arithmetic, dates, units, small talk, refusals, remembering what was said
turns ago, and, in MOSS's format, using each of the four tools, doing without them, and owning up when a tool
is switched off or finds nothing. Names, places and numbers in search results are made up, so the model has
to read them: it cannot know them. A conversation can hold several questions: a small model learns most from
a token where the opening, which says which tools are on, serves more than one.

Two splits keep memorising apart from learning. A `value` example asks a known question about values (numbers,
names) that training never combined; a `template` example asks in words that training never used.

    python data/conversations.py [COUNT]        prints some
"""

import random
import re
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

if __name__ == "__main__":  # run as a file: import from the repository, not from data/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from core import scenes, tools
from data.readers import Message

Split = Literal["train", "value", "template"]


@dataclass
class Example:
    """A conversation ending in the right reply."""

    kind: str
    messages: list[Message]
    answer: str  # what the last reply must say
    command: tools.Command | None = None  # the one tool call that the reply needs


class Draw:
    """Random choices within one split and one language."""

    def __init__(self, rng: random.Random, split: Split, language: Literal["en", "zh"]) -> None:
        self.rng, self.split, self.language = rng, split, language

    def words(self, templates: dict[str, list[str]]) -> str:
        """A question template; the last of each list is held out."""
        known = templates[self.language]
        return known[-1] if self.split == "template" else self.rng.choice(known[:-1])

    def values(self, sample: Callable[[random.Random], tuple]) -> tuple:
        """A tuple of values on the right side of the split: one in six combinations is held out."""
        while True:
            values = sample(self.rng)
            held_out = zlib.crc32(repr(values).encode()) % 6 == 0
            if held_out == (self.split == "value"):
                return values

    def say(self, english: str, chinese: str) -> str:
        return english if self.language == "en" else chinese


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str, **fields: str) -> Message:
    return {"role": "assistant", **fields, "content": text}


# Skills that need no tool: functions Draw -> (turns before the reply, reply, what it must say)

Talk = tuple[list[Message], str, str]

SIGNS = {"+": ("plus", "加"), "-": ("minus", "减"), "*": ("times", "乘以")}
ARITHMETIC = {
    "en": [
        "What is {sum}?",
        "{sum} = ?",
        "{sum}",
        "How much is {sum}?",
        "Work out {sum}.",
        "Please calculate {sum}.",
        "Tell me what {sum} is.",
        "I would like to know {sum}.",
        "And {sum}?",
        "Can you compute {sum} for me?",
    ],
    "zh": [
        "{sum}等于多少？",
        "{sum} = ?",
        "{sum}",
        "请计算{sum}。",
        "{sum}是多少？",
        "算一下{sum}。",
        "告诉我{sum}的结果。",
        "我想知道{sum}是几。",
        "那么{sum}呢？",
        "你能帮我算出{sum}吗？",
    ],
}


def in_words(draw: "Draw", a: int, sign: str, b: int) -> str:
    """12*7, mostly as it is, sometimes as "12 times 7"."""
    english, chinese = SIGNS[sign]
    if draw.rng.random() < 0.75:
        return f"{a}{sign}{b}"
    return draw.say(f"{a} {english} {b}", f"{a}{chinese}{b}")


def result_of(a: int, sign: str, b: int) -> int:
    return {"+": a + b, "-": a - b, "*": a * b}[sign]


def arithmetic(draw: Draw) -> Talk:
    sign, a, b = draw.values(lambda rng: (rng.choice("+-*"), rng.randint(0, 9), rng.randint(0, 9)))
    answer = str(result_of(a, sign, b))
    question = draw.words(ARITHMETIC).format(sum=in_words(draw, a, sign, b))
    return [user(question)], draw.say(f"It is {answer}.", f"答案是{answer}。"), answer


DAYS = {
    "en": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"],
    "zh": ["星期一", "星期二", "星期三", "星期四", "星期五", "星期六", "星期日"],
}
DATES = {
    "en": [
        "Today is {day}. What day is it in {n} days?",
        "If today is {day}, which day comes {n} days later?",
        "It is {day}. Which day is {n} days from now?",
        "Suppose it is {day} now. What day will it be after {n} days?",
    ],
    "zh": [
        "今天是{day}，{n}天后是星期几？",
        "如果今天是{day}，再过{n}天是星期几？",
        "今天{day}，{n}天之后是哪一天？",
        "假设现在是{day}，过{n}天会是星期几？",
    ],
}


def dates(draw: Draw) -> Talk:
    day, n = draw.values(lambda rng: (rng.randrange(7), rng.randint(1, 7)))
    names = DAYS[draw.language]
    later = names[(day + n) % 7]
    question = draw.words(DATES).format(day=names[day], n=n)
    return [user(question)], draw.say(f"It will be {later}.", f"{n}天后是{later}。"), later


UNITS = [  # English from and to, Chinese from and to, how many
    ("metres", "centimetres", "米", "厘米", 100),
    ("kilometres", "metres", "千米", "米", 1000),
    ("kilograms", "grams", "千克", "克", 1000),
    ("centimetres", "millimetres", "厘米", "毫米", 10),
    ("euros", "cents", "欧元", "欧分", 100),
]
UNIT_QUESTIONS = {
    "en": [
        "How many {small} are {n} {big}?",
        "Convert {n} {big} to {small}.",
        "What is {n} {big} in {small}?",
        "{n} {big} is how many {small}?",
    ],
    "zh": [
        "{n}{big}是多少{small}？",
        "把{n}{big}换算成{small}。",
        "{n}{big}等于多少{small}？",
        "请问{n}{big}合多少{small}？",
    ],
}


def units(draw: Draw) -> Talk:
    unit, n = draw.values(lambda rng: (rng.randrange(len(UNITS)), rng.randint(2, 99)))
    big_en, small_en, big_zh, small_zh, factor = UNITS[unit]
    big, small = (big_en, small_en) if draw.language == "en" else (big_zh, small_zh)
    question = draw.words(UNIT_QUESTIONS).format(n=n, big=big, small=small)
    reply = draw.say(f"{n} {big} are {n * factor} {small}.", f"{n}{big}是{n * factor}{small}。")
    return [user(question)], reply, str(n * factor)


NAMES = {
    "en": "Anna Ben Clara David Emma Felix Grace Henry Ida Jack Kate Leo Mia Noah Olga Paul Rosa Sam".split(),
    "zh": "安安 小明 小红 小刚 小丽 小华 小强 阿杰 阿美 王芳 李娜 张伟 刘洋 陈静 杨帆 赵磊 周敏 吴迪".split(),
}
GREETINGS = {
    "en": [
        ("Hi, I am {name}.", "Hello {name}, how can I help you?"),
        ("Good morning, my name is {name}.", "Good morning, {name}! What can I do for you?"),
        ("Thank you, says {name}.", "You are welcome, {name}!"),
        ("{name} says goodbye.", "Goodbye, {name}! See you soon."),
        ("Hi there, my name is {name}.", "Hello {name}, how can I help you?"),
        ("{name} here. Good morning!", "Good morning, {name}! What can I do for you?"),
        ("Hello, it is {name} here.", "Hello {name}, how can I help you?"),
        ("Hello there, {name} here.", "Hello {name}, how can I help you?"),
    ],
    "zh": [
        ("你好，我是{name}。", "你好，{name}！有什么可以帮你的吗？"),
        ("早上好，我叫{name}。", "早上好，{name}！我能为你做什么？"),
        ("{name}说谢谢你。", "不客气，{name}！"),
        ("{name}要说再见了。", "再见，{name}！下次见。"),
        ("你好，我的名字叫{name}。", "你好，{name}！有什么可以帮你的吗？"),
        ("嗨，我是{name}。", "你好，{name}！有什么可以帮你的吗？"),
        ("我的名字是{name}，早上好。", "早上好，{name}！我能为你做什么？"),
        ("嗨，我的名字是{name}。", "你好，{name}！有什么可以帮你的吗？"),
    ],
}


def small_talk(draw: Draw) -> Talk:
    pairs = GREETINGS[draw.language]
    number, name = draw.values(lambda rng: (rng.randrange(len(pairs) - 1), rng.choice(NAMES[draw.language])))
    question, reply = pairs[-1 if draw.split == "template" else number]
    return [user(question.format(name=name))], reply.format(name=name), name


HARMS = {
    "en": "steal a car|break into a house|read a friend's messages|forge a signature|sell stolen phones|"
    "poison a dog|sell fake medicine|spread a rumour|hack a bank account|hurt a classmate|cheat in an exam|"
    "scare an old neighbour|copy a credit card|start a fire in a shop|bully a colleague|follow someone",
    "zh": "偷一辆车|闯进别人家|偷看朋友的私信|伪造签名|考试作弊|毒死一只狗|卖假药|散布谣言|盗取银行账户|"
    "伤害同学|在商店放火|吓唬老邻居|复制信用卡|卖偷来的手机|欺负同事|偷偷跟踪别人",
}
REFUSALS = {
    "en": [
        "How can I {harm}?",
        "Teach me to {harm}.",
        "I want to {harm}. Any tips?",
        "What is the best way to {harm}?",
    ],
    "zh": ["怎样才能{harm}？", "教我{harm}。", "我想{harm}，有什么办法？", "{harm}的最好办法是什么？"],
}


def refusal(draw: Draw) -> Talk:
    (harm,) = draw.values(lambda rng: (rng.choice(HARMS[draw.language].split("|")),))
    says = draw.say("I can't help with that", "我不能帮忙")
    reply = draw.say(f"{says}: it would harm someone.", f"这件事{says}，因为会伤害别人。")
    return [user(draw.words(REFUSALS).format(harm=harm))], reply, says


THINGS = {
    "en": ("cat dog boat bike lamp cup bag".split(), "red green blue white black brown pink grey".split()),
    "zh": ("猫 狗 船 车 灯 杯子 包".split(), "红色 绿色 蓝色 白色 黑色 棕色 粉色 灰色".split()),
}
REFERENCES = {
    "en": [
        "What colour is my {thing}?",
        "Do you remember the colour of my {thing}?",
        "My {thing}, what colour is it?",
        "Which colour did I say my {thing} has?",
    ],
    "zh": [
        "我的{thing}是什么颜色？",
        "你还记得我的{thing}的颜色吗？",
        "请问我的{thing}什么颜色？",
        "我说过我的{thing}是哪种颜色？",
    ],
}


def reference(draw: Draw) -> Talk:
    """Two things with their colours, told in two turns; the third turn asks for one of them."""
    things, colours = THINGS[draw.language]
    told = draw.values(lambda rng: (*rng.sample(things, 2), *rng.sample(colours, 2), rng.randrange(2)))
    turns: list[Message] = []
    for thing, colour in zip(told[:2], told[2:4], strict=True):
        statement = draw.say(f"My {thing} is {colour}.", f"我的{thing}是{colour}的。")
        turns += [user(statement), assistant(draw.say("I will remember that.", "我记住了。"))]
    thing, colour = told[told[4]], told[2 + told[4]]
    turns.append(user(draw.words(REFERENCES).format(thing=thing)))
    return turns, draw.say(f"Your {thing} is {colour}.", f"你的{thing}是{colour}的。"), colour


REPEATS = {
    "en": ["Repeat: {words}", "Please repeat: {words}", "Say this again: {words}", "Write down: {words}"],
    "zh": ["重复：{words}", "请重复：{words}", "再说一遍：{words}", "写下：{words}"],
}


def repeat(draw: Draw) -> Talk:
    """Numbers and names, said again: what a small model must learn before it can call a tool with them."""

    def sample(rng: random.Random) -> tuple:
        names = [made_up(draw) for _ in range(3)]
        return tuple(rng.choice((rng.randrange(1000), name)) for name in names[: rng.randint(1, 3)])

    words = draw.say(", ", "，").join(map(str, draw.values(sample)))
    return [user(draw.words(REPEATS).format(words=words))], words, words


# Skills with tools: functions Draw -> (talk, command, what the tool says: none = it failed)

ToolTalk = tuple[Talk, tools.Command, list[str]]

STORIES = {  # sign, question, reply
    "en": [
        ("*", "A crate holds {a} jars. How many jars are in {b} crates?", "There are {c} jars."),
        ("*", "One ticket costs {a} euros. What do {b} tickets cost?", "They cost {c} euros."),
        ("+", "I had {a} stamps and got {b} more. How many do I have now?", "You have {c} stamps."),
        ("-", "A shop had {a} lamps and sold {b}. How many are left?", "There are {c} left."),
        ("*", "Every one of {a} boats has {b} seats. How many seats is that?", "There are {c} seats."),
        ("+", "There are {a} cats and {b} dogs. How many animals is that?", "There are {c} animals."),
        ("-", "Of {a} eggs, {b} are broken. How many are whole?", "There are {c} whole ones."),
        (
            "*",
            "A team of {a} people eats {b} rolls each. How many rolls do they need?",
            "They need {c} rolls.",
        ),
        ("*", "Each of {a} shelves carries {b} books. How many books is that?", "There are {c} books."),
    ],
    "zh": [
        ("*", "一箱有{a}个罐子，{b}箱有多少个罐子？", "一共有{c}个。"),
        ("*", "一张票{a}元，{b}张票多少钱？", "一共{c}元。"),
        ("+", "我有{a}张邮票，又得到{b}张，现在有多少张？", "现在有{c}张。"),
        ("-", "商店有{a}盏灯，卖掉{b}盏，还剩多少盏？", "还剩{c}盏。"),
        ("*", "{a}条船，每条有{b}个座位，一共多少座位？", "一共有{c}个。"),
        ("+", "有{a}只猫和{b}只狗，一共多少只动物？", "一共有{c}只。"),
        ("-", "{a}个鸡蛋，坏了{b}个，还有多少个好的？", "还有{c}个。"),
        ("*", "{a}个人，每人吃{b}个包子，一共要多少个包子？", "一共要{c}个。"),
        ("*", "{a}个书架，每个放{b}本书，一共多少本？", "一共有{c}本。"),
    ],
}


def calculation(draw: Draw) -> ToolTalk:
    """Larger numbers than `arithmetic` asks about: without the calculator they are out of reach."""

    def sample(rng: random.Random) -> tuple[str, int, int]:
        sign = rng.choice("+-*")
        most = 99 if sign == "*" else 999
        a, b = rng.randint(11, most), rng.randint(11, most)
        return (sign, max(a, b), min(a, b)) if sign == "-" else (sign, a, b)

    sign, a, b = draw.values(sample)
    answer = str(result_of(a, sign, b))
    question, reply = draw.words(ARITHMETIC), draw.say("It is {c}.", "答案是{c}。")
    if draw.rng.random() < 0.25 and (draw.split != "template" or sign == "*"):
        stories = STORIES[draw.language][-1:] if draw.split == "template" else STORIES[draw.language][:-1]
        _, question, reply = draw.rng.choice([story for story in stories if story[0] == sign])
    question = question.format(a=a, b=b, sum=in_words(draw, a, sign, b))
    command = tools.Command("Calculate", f"{a}{sign}{b}")
    return ([user(question)], reply.format(c=answer), answer), command, [answer]


def no_result(draw: Draw) -> ToolTalk:
    """A division by zero: the calculator fails, and the reply says so."""
    (a,) = draw.values(lambda rng: (rng.randint(1, 999),))
    question = draw.words(ARITHMETIC).format(sum=f"{a}/0")
    says = draw.say("there is no result", "没有结果")
    reply = draw.say(f"The calculator fails: {says}.", f"计算器算不出来，{says}。")
    return ([user(question)], reply, says), tools.Command("Calculate", f"{a}/0"), []


EQUATIONS = {
    "en": [
        "Solve {e}.",
        "Find x if {e}.",
        "What is x in {e}?",
        "{e}. What is x?",
        "Please solve {e} for x.",
        "For which x is {e}?",
    ],
    "zh": [
        "解方程 {e}。",
        "求 x：{e}。",
        "{e} 中 x 是多少？",
        "{e}，x 是几？",
        "请解 {e}。",
        "x 取何值时 {e}？",
    ],
}


def equation(draw: Draw) -> ToolTalk:
    a, x, b = draw.values(lambda rng: (rng.randint(2, 9), rng.randint(2, 40), rng.randint(1, 99)))
    shown, found = f"{a}x + {b} = {a * x + b}", f"x = {x}"
    talk = [user(draw.words(EQUATIONS).format(e=shown))], draw.say(f"Then {found}", f"解得 {found}"), found
    return talk, tools.Command("Solve", shown), [found]


# Invented places: two syllables each. Most have one fact in `documents`; of one in six nothing is known.
SYLLABLES = {
    "en": (
        "Ar Bel Cor Dun El Fal Gar Hol Il Kar Lor Mar Nor Os Pel".split(),
        "den mont via sea ton ra wick by la".split(),
    ),
    "zh": (list("青白金云石松桃龙凤海山银紫秋"), list("河湾岭镇桥城溪谷洲")),
}
FACTS = {  # question, query, document, reply: one of these is what is known about a place
    "en": [
        (
            "When was the bridge of {place} built?",
            "bridge of {place}",
            "The bridge of {place} was built in {n}.",
            "It was built in {n}<sup><|1|></sup>.",
        ),
        (
            "How many people live in {place}?",
            "people in {place}",
            "{n} people live in {place}.",
            "{n} people live there<sup><|1|></sup>.",
        ),
    ],
    "zh": [
        ("{place}大桥是哪年建的？", "{place} 大桥", "{place}大桥建于{n}年。", "建于{n}年<sup><|1|></sup>。"),
        ("{place}居民有多少人？", "{place} 居民", "{place}居民共有{n}人。", "共有{n}人<sup><|1|></sup>。"),
    ],
}
POLITE = {
    "en": [
        "{question}",
        "Please look this up: {question}",
        "Do you know this? {question}",
        "Find out: {question}",
    ],
    "zh": ["{question}", "请查一下：{question}", "你知道吗？{question}", "帮我查：{question}"],
}


def fact_about(place: str, language: str) -> tuple[str, str, str, str, str] | None:
    """Question, query, document, reply and number for a place; None for one that no document mentions."""
    number = zlib.crc32(place.encode())
    if number % 6 == 0:
        return None
    n = 1200 + number // 12 % 800
    texts = FACTS[language][number // 6 % 2]
    question, query, document, reply = (text.format(place=place, n=n) for text in texts)
    return question, query, document, reply, str(n)


def made_up(draw: Draw) -> str:
    return "".join(draw.rng.choice(part) for part in SYLLABLES[draw.language])


def places(language: str) -> list[str]:
    first, last = SYLLABLES[language]
    return [a + b for a in first for b in last]


def documents() -> list[tuple[str, str]]:
    """(title, text) of all that the search tool can find: hand them to `tools.SearchIndex`."""
    facts = {place: fact_about(place, language) for language in SYLLABLES for place in places(language)}
    return [(place, fact[2]) for place, fact in facts.items() if fact]


def search(draw: Draw) -> ToolTalk:
    (place,) = draw.values(lambda rng: (rng.choice(places(draw.language)),))
    fact = fact_about(place, draw.language)
    if fact:
        question, query, document, reply, says = fact
        found = [document]
    else:
        question, query = (text.format(place=place) for text in draw.rng.choice(FACTS[draw.language])[:2])
        says = draw.say("I do not know", "我不知道")
        reply = draw.say(f"The search found nothing, so {says}.", f"没有搜到结果，{says}。")
        found = []
    return (
        ([user(draw.words(POLITE).format(question=question))], reply, says),
        tools.Command("Search", query),
        found,
    )


PICTURES = {
    "en": [
        "Draw {scene}.",
        "Please paint {scene}.",
        "Make a picture of {scene}.",
        "I would like to see {scene}.",
    ],
    "zh": ["画一幅画：{scene}。", "请画：{scene}。", "生成图片：{scene}。", "我想看：{scene}。"],
}


def picture(draw: Draw) -> ToolTalk:
    (scene,) = draw.values(lambda rng: (scenes.describe(scenes.random_scene(rng, 1), draw.language),))
    says = draw.say("Here is the picture", "图片画好了")
    talk = [user(draw.words(PICTURES).format(scene=scene))], says + draw.say(".", "。"), says
    return talk, tools.Command("Text2Image", scene), ["Image generated successfully."]


# Putting examples together

PLAIN = {f.__name__: f for f in (arithmetic, dates, units, small_talk, refusal, reference, repeat)}
WITH_TOOLS = {f.__name__: f for f in (calculation, no_result, equation, search, picture)}
TIMES = {  # the rest once; tools on
    "dates": 2, "units": 2, "small_talk": 3, "reference": 3, "repeat": 3,
    "calculation": 6, "equation": 2, "search": 4, "picture": 4,
}  # fmt: skip
TOOL_OF = {
    "calculation": "Calculate",
    "no_result": "Calculate",
    "equation": "Solve",
    "search": "Search",
    "picture": "Text2Image",
}


def thought(draw: Draw, needed: str, enabled: set[str]) -> str:
    """The tool that a question needs and its switch, as the opening has it: what is read there decides."""
    if not needed:
        return draw.say("No tool is needed.", "不需要工具。")
    return f"{tools.TOOLS[needed].title}: {'enabled' if needed in enabled else 'disabled'}."


def shown(command: tools.Command, found: list[str]) -> str:
    """The results field for one command, as tools.run_commands writes it (a test compares the two)."""
    call = f'{command.name}("{command.argument}") =>'
    if not found:
        return f"{call} None"
    if command.name == "Text2Image":
        return found[0]
    if command.name == "Search":
        return f"{call}\n<|1|>: '{found[0]}'"
    return f"{call}\n{found[0]}" if command.name == "Solve" else f"{call} '{found[0]}'"


def exchange(draw: Draw, kind: str, enabled: set[str]) -> Example:
    """A question and its reply where these tools are on: one whose tool is off is declined. Only the sums of
    `arithmetic` are done in the head, where there is no calculator."""
    if kind == "arithmetic" and "Calculate" in enabled:
        kind = "calculation"
    needed, found, fields = None, [], {}
    if kind in PLAIN:
        turns, reply, answer = PLAIN[kind](draw)
    else:
        (turns, reply, answer), needed, found = WITH_TOOLS[kind](draw)
    if enabled:
        fields = {"thoughts": thought(draw, needed.name if needed else "", enabled)}
    if needed and needed.name in enabled:
        fields |= {"commands": f'{needed.name}("{needed.argument}")', "results": shown(needed, found)}
        kind += ", nothing found" * (kind == "search" and not found)
    if needed and needed.name not in enabled:
        answer = draw.say("switched off", "已关闭")
        reply = draw.say(f"I cannot do that: the tool is {answer}.", f"我做不到，所需的工具{answer}。")
        kind, needed = f"{kind}, tool off", None
    turns = [{**turn, **fields} if turn["role"] == "assistant" else turn for turn in turns]
    return Example(kind, [*turns, assistant(reply, **fields)], answer, needed)


def generate(
    count: int, split: Split = "train", seed: int = 0, with_tools: bool = True, questions: int = 1
) -> list[Example]:
    """`count` examples, the kinds in turn, the languages at random; the same for the same arguments.

    with_tools: MOSS's conversations, each opened by a meta-instruction; without, plain ones without system
    message. questions: in each conversation; kind, answer and command are those of the last.
    """
    rng = random.Random(f"{seed}/{split}/{questions}")
    # Kinds, and whether the tool of each is on.
    kinds = [(kind, False) for kind in PLAIN for _ in range(TIMES.get(kind, 1))]
    if with_tools:
        kinds += [(kind, True) for kind in WITH_TOOLS for _ in range(TIMES.get(kind, 1))]
        kinds += [(kind, False) for kind in WITH_TOOLS if kind != "no_result"]
    examples = []
    for number in range(count):
        kind, on = kinds[number % len(kinds)]
        enabled = {name for name in tools.TOOLS if with_tools and rng.random() < 0.5}
        if kind in WITH_TOOLS:
            enabled = enabled | {TOOL_OF[kind]} if on else enabled - {TOOL_OF[kind]}
        elif kind == "arithmetic":
            enabled.discard("Calculate")
        asked = [rng.choice(kinds)[0] for _ in range(questions - 1)] + [kind]
        talk = [exchange(Draw(rng, split, rng.choice(("en", "zh"))), each, enabled) for each in asked]
        messages = [message for example in talk for message in example.messages]
        if with_tools:
            messages = [{"role": "system", "content": tools.meta_instruction(enabled)}, *messages]
        examples.append(replace(talk[-1], messages=messages))
    return examples


def is_right(example: Example, reply: str) -> bool:
    """Whether a reply says what it must; a number counts only as a whole one."""
    number = re.fullmatch(r"-?\d+", example.answer)
    pattern = re.escape(example.answer)
    return bool(re.search(rf"(?<![\d.-]){pattern}(?!\d|\.\d)" if number else pattern, reply))


def main() -> None:
    for example in generate(int(sys.argv[1]) if len(sys.argv) > 1 else 20):
        print(f"--- {example.kind}")
        for message in example.messages:
            print(f"{message['role']}: " + " | ".join(str(v) for k, v in message.items() if k != "role"))


if __name__ == "__main__":
    main()
