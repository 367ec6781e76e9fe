"""Small bilingual texts made by rule: arithmetic, dates, units, everyday dialogues, things to repeat, in
English and in Chinese.

They stand in for a Chinese corpus where none is installed and give a tiny model something it can master:
later stages ask it for exactly such answers. Half of them ask for nothing but copying, since whoever calls a
tool must first be able to repeat a number or a name that they were told. Every text is about one subject (a
number, a day, a length, a person's errand), and subjects, not lines, are held out for validation, so what is
validated was never said in training. Installed Chinese message catalogues (gettext), where the system has
some, are added as bilingual word lists.
"""

import random
import struct
import sys
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path

from core import scenes, tools

SUBJECTS = 40_000  # of each kind; about 30 MB in all

DIGITS = "零一二三四五六七八九"
EN_UNDER_20 = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
EN_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
EN_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
EN_MONTHS = "January February March April May June July August September October November December".split()
PEOPLE = {
    "Anna": "小安", "Ben": "小本", "Lily": "莉莉", "Tom": "汤姆", "Mei": "小梅",
    "Wang Wei": "王伟", "Li Na": "李娜", "Sara": "莎拉", "Max": "马克", "Nora": "诺拉",
}  # fmt: skip
# English singular and plural, Chinese measure word and noun
GOODS = (
    ("apple", "apples", "个", "苹果"), ("pen", "pens", "支", "笔"), ("book", "books", "本", "书"),
    ("cup", "cups", "个", "杯子"), ("egg", "eggs", "个", "鸡蛋"), ("ticket", "tickets", "张", "票"),
    ("chair", "chairs", "把", "椅子"), ("fish", "fish", "条", "鱼"), ("box", "boxes", "个", "盒子"),
    ("flower", "flowers", "朵", "花"), ("bottle", "bottles", "个", "瓶子"), ("shirt", "shirts", "件", "衬衫"),
)  # fmt: skip
# (English plural, Chinese), (the smaller unit), how many of the smaller in one
UNITS = (
    (("metres", "米"), ("centimetres", "厘米"), 100), (("kilometres", "公里"), ("metres", "米"), 1000),
    (("kilograms", "千克"), ("grams", "克"), 1000), (("hours", "小时"), ("minutes", "分钟"), 60),
    (("minutes", "分钟"), ("seconds", "秒"), 60), (("days", "天"), ("hours", "小时"), 24),
    (("weeks", "周"), ("days", "天"), 7), (("litres", "升"), ("millilitres", "毫升"), 1000),
    (("yuan", "元"), ("jiao", "角"), 10), (("years", "年"), ("months", "个月"), 12),
)  # fmt: skip


def english_number(n: int) -> str:
    """0 to 999,999 in words."""
    if n < 20:
        return EN_UNDER_20[n]
    if n < 100:
        return EN_TENS[n // 10 - 2] + (f"-{EN_UNDER_20[n % 10]}" if n % 10 else "")
    if n < 1000:
        return f"{EN_UNDER_20[n // 100]} hundred" + (f" and {english_number(n % 100)}" if n % 100 else "")
    return f"{english_number(n // 1000)} thousand" + (f" {english_number(n % 1000)}" if n % 1000 else "")


def chinese_number(n: int) -> str:
    """0 to 99,999 in characters: 10 is 十, 205 is 二百零五."""
    if n < 10:
        return DIGITS[n]
    if n < 20:
        return "十" + (DIGITS[n % 10] if n % 10 else "")
    for size, name in ((10_000, "万"), (1000, "千"), (100, "百"), (10, "十")):
        if n >= size:
            head, rest = divmod(n, size)
            zero = "零" if rest and rest < size // 10 else ""
            tail = f"一{chinese_number(rest)}" if 10 <= rest < 20 else chinese_number(rest) if rest else ""
            return chinese_number(head) + name + zero + tail
    raise AssertionError(n)


def arithmetic(a: int, chinese: bool, rng: random.Random) -> str:
    """Facts about one number: its name, sums, differences, products, quotients, remainders."""
    lines = [f"{a}写作{chinese_number(a)}。" if chinese else f"{a} is written {english_number(a)}."]
    for _ in range(rng.randint(6, 14)):
        b = rng.randint(0, 20) if rng.random() < 0.5 else rng.randint(0, 10 ** rng.randint(1, 4))
        c = rng.randint(2, 12)
        high, low = max(a, b), min(a, b)
        left, right, result, sign, english, mandarin = rng.choice(
            (
                (a, b, a + b, "+", "What is {} plus {}?", "{}加{}等于多少？"),
                (high, low, high - low, "-", "What is {} minus {}?", "{}减{}等于多少？"),
                (a, c, a * c, "*", "What is {} times {}?", "{}乘以{}等于多少？"),
                (a * c, c, a, "/", "What is {} divided by {}?", "{}除以{}等于多少？"),
                (a, c, a % c, "%", "What remains of {} divided by {}?", "{}除以{}余多少？"),
            )
        )
        question = (mandarin if chinese else english).format(left, right)
        answer = f"{result}。" if chinese else f" {result}."
        lines.append(f"{left} {sign} {right} = {result}" if rng.random() < 0.4 else question + answer)
    return "\n".join(lines)


def calendar(number: int, chinese: bool, rng: random.Random) -> str:
    """One day, the number-th since 1970: its weekday, and days before and after it."""
    day = date(1970, 1, 1) + timedelta(days=number)
    lines = []
    for _ in range(rng.randint(3, 6)):
        distance, later = rng.randint(1, 40), rng.random() < 0.5
        other = day + timedelta(days=distance if later else -distance)
        if chinese:
            known, way = f"{chinese_date(day)}是星期{chinese_weekday(day)}", "之后" if later else "之前"
            lines.append(f"{known}。{distance}天{way}是{chinese_date(other)}，星期{chinese_weekday(other)}。")
        else:
            known, way = f"{english_date(day)} is a {EN_DAYS[day.weekday()]}", "after" if later else "before"
            days = "day" if distance == 1 else "days"
            found = f"{english_date(other)}, a {EN_DAYS[other.weekday()]}"
            lines.append(f"{known}. {distance} {days} {way} it is {found}.")
    lines.append(f"{day.isoformat()} = {english_date(day)} = {chinese_date(day)}")
    return "\n".join(lines)


def english_date(day: date) -> str:
    return f"{day.day} {EN_MONTHS[day.month - 1]} {day.year}"


def chinese_date(day: date) -> str:
    return f"{day.year}年{day.month}月{day.day}日"


def chinese_weekday(day: date) -> str:
    return "一二三四五六日"[day.weekday()]


def conversion(amount: int, chinese: bool, rng: random.Random) -> str:
    """One amount in several units, asked and answered."""
    lines = []
    for (en_large, zh_large), (en_small, zh_small), factor in rng.sample(UNITS, 5):
        lines.append(
            rng.choice(
                (
                    f"{amount}{zh_large}等于{amount * factor}{zh_small}。",
                    f"{amount * factor}{zh_small}是多少{zh_large}？{amount}{zh_large}。",
                )
                if chinese
                else (
                    f"{amount} {en_large} are {amount * factor} {en_small}.",
                    f"How many {en_large} are {amount * factor} {en_small}? {amount} {en_large}.",
                )
            )
        )
    return "\n".join(lines)


def dialogue(number: int, chinese: bool, rng: random.Random) -> str:
    """The number-th talk of two people: buying, sharing, meeting, ages. Reasons come before results."""
    one, two = rng.sample(sorted(PEOPLE), 2)
    singular, plural, measure, noun = rng.choice(GOODS)
    count, price, given = rng.randint(2, 30), rng.randint(2, 50), rng.randint(1, 20)
    hour, wait = rng.randint(7, 18), rng.randint(1, 4)
    age, gap = rng.randint(6, 40), rng.randint(1, 30)
    cost = count * price
    note = 50 * (cost // 50 + 1)
    english_scenes = (
        (
            f"Hello, I would like to buy {count} {plural}.",
            f"One {singular} is {price} yuan. {count} times {price} is {cost}, so that is {cost} yuan.",
            f"Here are {note} yuan.",
            f"Your change is {note} minus {cost}, which is {note - cost} yuan. Thank you!",
        ),
        (
            f"I have {count} {plural} and you give me {given} more. How many do I have?",
            f"{count} plus {given} is {count + given}, so you have {count + given} {plural}.",
            "Right, thank you.",
        ),
        (
            f"Shall we meet at {hour}:00?",
            f"I will be {wait} hours later. {hour} plus {wait} is {hour + wait}. Is {hour + wait}:00 fine?",
            f"Fine, see you at {hour + wait}:00.",
        ),
        (
            "How old are you?",
            f"I am {age}. And you?",
            f"I am {gap} years older than you. {age} plus {gap} is {age + gap}, so I am {age + gap}.",
        ),
    )
    chinese_scenes = (
        (
            f"你好，我想买{count}{measure}{noun}。",
            f"好的，每{measure}{price}元，{count}乘以{price}，一共{cost}元。",
            f"给你{note}元。",
            f"找你{note}减{cost}，也就是{note - cost}元。谢谢！",
        ),
        (
            f"我有{count}{measure}{noun}，再给我{given}{measure}，我一共有多少？",
            f"{count}加{given}等于{count + given}，所以你有{count + given}{measure}{noun}。",
            "对，谢谢你。",
        ),
        (
            f"我们{hour}点见面好吗？",
            f"我要晚{wait}个小时，{hour}加{wait}是{hour + wait}，{hour + wait}点可以吗？",
            f"可以，{hour + wait}点见。",
        ),
        (
            "你今年多大？",
            f"我{age}岁。你呢？",
            f"我比你大{gap}岁，{age}加{gap}，我{age + gap}岁。",
        ),
    )
    names, colon = ((PEOPLE[one], PEOPLE[two]), "：") if chinese else ((one, two), ": ")
    said = rng.choice(chinese_scenes if chinese else english_scenes)
    return "\n".join(f"{names[turn % 2]}{colon}{words}" for turn, words in enumerate(said))


SIGNS = (("+", "plus", "加"), ("-", "minus", "减"), ("*", "times", "乘以"))
EN_SYLLABLES = "ar bel cor dun el fal gar hol il kar lor mar nor os pel den mont via sea ton ra wick".split()
ZH_SYLLABLES = "青白金云石松桃龙凤海山银紫秋河湾岭镇桥城溪谷洲红黄蓝绿大小猫狗船车灯杯包星月风雨"


def made_up(chinese: bool, rng: random.Random) -> str:
    """A number or a name that cannot be known, only copied."""
    if rng.random() < 0.6:
        return str(rng.randrange(10 ** rng.randint(1, 4)))
    if chinese:
        return "".join(rng.choices(ZH_SYLLABLES, k=rng.randint(2, 3)))
    return "".join(rng.choices(EN_SYLLABLES, k=rng.randint(2, 3))).capitalize()


def recall(number: int, chinese: bool, rng: random.Random) -> str:
    """Names and numbers, told and said again: repeated, looked up, written another way."""
    people = rng.sample(sorted(PEOPLE), rng.randint(2, 4))
    if chinese:
        people = [PEOPLE[person] for person in people]
    known = {person: made_up(chinese, rng) for person in people}
    known[people[0]] = str(number)
    lines = [f"{person}：{value}" if chinese else f"{person}: {value}" for person, value in known.items()]
    for _ in range(rng.randint(4, 9)):
        person, value = rng.choice(list(known.items()))
        a, b, new = rng.randrange(1000), rng.randrange(1000), made_up(chinese, rng)
        sign, english, mandarin = rng.choice(SIGNS)
        lines.append(
            rng.choice(
                (
                    f"{person}？{value}",
                    f"重复“{new}”：“{new}”",
                    f"{new}，{value}：{new}，{value}",
                    f"{a}{mandarin}{b}：{a}{sign}{b}",
                )
                if chinese
                else (
                    f"{person}? {value}",
                    f'Repeat "{new}": "{new}"',
                    f"{new}, {value}: {new}, {value}",
                    f"{a} {english} {b}: {a}{sign}{b}",
                )
            )
        )
    return "\n".join(lines)


EN_COMMON = (
    "time year day thing man world life hand part child eye place work week case point home room".split()
)
ZH_COMMON = "人天地水火山手门车书花鸟东西南北上下大小"


def echo(number: int, chinese: bool, rng: random.Random) -> str:
    """Short numbers and sums among words, quoted and at once quoted again: copying starts here.

    Longer strings, or words in place of digits, did not teach it in the time that a tiny model has.
    """
    lines = []
    for _ in range(rng.randint(6, 12)):
        told = str(rng.randrange(10, 10_000))
        if rng.random() < 0.3:
            told = f"{rng.randrange(10, 1000)}{rng.choice(SIGNS)[0]}{rng.randrange(10, 1000)}"
        count = rng.randint(1, 6)
        around = (
            "".join(rng.choices(ZH_COMMON, k=count)) if chinese else " ".join(rng.choices(EN_COMMON, k=count))
        )
        lines.append(f'{around} "{told}" = "{told}"')
    return "\n".join(lines)


def scene(number: int, chinese: bool, rng: random.Random) -> str:
    """Pictures in words (core/scenes.py), each said again or in the other language."""
    lines = []
    for _ in range(rng.randint(2, 4)):
        shown = scenes.random_scene(rng, rng.randint(1, 2))
        here, there = (scenes.describe(shown, language) for language in ("en", "zh"))
        here, there = (there, here) if chinese else (here, there)
        again = here if rng.random() < 0.5 else there
        lines.append(f"画：{here}\n图片：{again}" if chinese else f"Draw: {here}\nPicture: {again}")
    return "\n".join(lines)


def switches(number: int, chinese: bool, rng: random.Random) -> str:
    """Which tools are on, told as a conversation's opening tells it, and asked back."""
    on = rng.sample(list(tools.TOOLS), rng.randint(0, len(tools.TOOLS)))
    lines = [f"{number}.", tools.meta_instruction(on).rstrip()]
    for name, tool in rng.sample(list(tools.TOOLS.items()), 2):
        state = "enabled" if name in on else "disabled"
        if chinese:
            state = "已打开" if name in on else "已关闭"
        lines.append(f"{tool.title}? {name}? {state}.")
    return "\n".join(lines)


VOCABULARY = (
    "How much=多少钱; How many=多少个; What is=是什么; Which day=星期几; When=哪年; Who=谁; Where=哪里; "
    "Please=请; Tell me=告诉我; I want to know=我想知道; I would like to see=我想看; "
    "Do you remember=你还记得吗; Can you help me=你能帮我吗; Calculate=请计算; Compute=算出; "
    "Work out=算一下; Convert=换算成; Solve=解方程; Search=搜索; Look this up=查一下; Find out=求; "
    "Draw=画; Paint=画一幅画; Make a picture=生成图片; Teach me=教我; "
    "I need the calculator=需要用计算器; I need the equation solver=需要解方程; "
    "I need to search=需要搜索; I need to draw=需要画图; No tool is needed=不需要工具; "
    "The tool for this is off=所需的工具已关闭; switched off=已关闭; I cannot do that=我做不到; "
    "I can't help with that=这件事我不能帮忙; harm someone=会伤害别人; found nothing=没有搜到结果; "
    "I do not know=我不知道; there is no result=没有结果; The calculator fails=计算器算不出来; "
    "Here is the picture=图片画好了; Image generated successfully=图片生成了; It is=答案是; "
    "The result=结果; Then x=解得; They cost=一共; There are=一共有; You have=现在有; are left=还剩; "
    "people live there=共有居民; was built in=建于; bridge=大桥; expression=算式; query=问题; "
    "equation=方程; description=说明; days later=天后是; centimetres=厘米; millimetres=毫米; "
    "kilometres=千米; euros=欧元; cents=欧分; jars=罐子; crate=箱; tickets=张票; stamps=邮票; "
    "lamps=盏灯; shelves=书架; books=本书; shop=商店; colour=颜色; cat=猫; dog=狗; boat=船; bike=车; "
    "lamp=灯; cup=杯子; bag=包; white=白色; brown=棕色; pink=粉色; grey=灰色; "
    "I will remember that=我记住了; Hello=你好; Good morning=早上好; Goodbye=再见; "
    "You are welcome=不客气; My name is=我的名字是; How can I help you=有什么可以帮你的; "
    "Capabilities and tools=能力和工具; possess=拥有; Human=人; MOSS=助手; Inner Thoughts=想法; "
    "Commands=命令; Results=各项结果; best way=最好办法; suppose=假设; honest=诚实"
)
WORDS = dict(pair.split("=") for pair in VOCABULARY.split("; "))


def words(number: int, chinese: bool, rng: random.Random) -> str:
    """A page of a dictionary, and some of its entries asked back."""
    page = rng.sample(list(WORDS.items()), rng.randint(5, 9))
    if chinese:
        page = [(there, here) for here, there in page]
    lines = [f"<|{here}|>: {there}" for here, there in page]
    return "\n".join(lines + [f"{here} = {there}" for here, there in rng.sample(page, 3)])


def drills() -> Iterator[tuple[str, str]]:
    """(subject, text) pairs in a fixed shuffled order, the same on every machine.

    Arithmetic comes twice, about a large and about a small number, since small ones are what is met most;
    recall and echo come often, since nothing else teaches to copy and later stages need it in every answer.
    """
    order = list(range(SUBJECTS))
    random.Random(0).shuffle(order)
    for subject in order:
        number, chinese = subject // 2, subject % 2 == 1
        about = (
            (arithmetic, number),
            (arithmetic, number % 100),
            (calendar, number),
            (conversion, 1 + number),
            (dialogue, number),
            (scene, number),
            (switches, number),
            (words, number),
            *((recall, 3 * number + again) for again in range(3)),
            *((echo, 5 * number + again) for again in range(5)),
        )
        for make, what in about:
            name = f"{make.__name__} {what}"
            yield name, make(what, chinese, random.Random(f"{name} {subject}"))


def catalogues(
    roots: tuple[Path, ...] = (Path(sys.prefix), Path("/usr/share/locale")),
) -> Iterator[tuple[str, str]]:
    """(file name, text) of the installed Chinese message catalogues: each message, then its translation."""
    for root in roots:
        for path in sorted(root.rglob("zh_CN/LC_MESSAGES/*.mo")):
            pairs = [(en, zh) for en, zh in read_catalogue(path.read_bytes()) if en and zh and en != zh]
            for start in range(0, len(pairs), 40):
                yield path.stem, "\n\n".join(f"{en}\n{zh}" for en, zh in pairs[start : start + 40])


def read_catalogue(content: bytes) -> list[tuple[str, str]]:
    """Messages and translations of a gettext .mo file (GNU gettext manual, "The Format of GNU MO Files").

    Only UTF-8 catalogues; of messages with plural forms the first. A file of another format gives nothing.
    """
    order = {b"\xde\x12\x04\x95": "<", b"\x95\x04\x12\xde": ">"}.get(content[:4])
    if order is None:
        return []
    count, originals, translations = struct.unpack_from(order + "3I", content, 8)
    pairs = []
    for i in range(count):
        texts = []
        for table in (originals, translations):
            length, offset = struct.unpack_from(order + "2I", content, table + 8 * i)
            texts.append(content[offset : offset + length].split(b"\0")[0])
        try:
            pairs.append((texts[0].decode(), texts[1].decode()))
        except UnicodeDecodeError:
            continue
    return pairs
