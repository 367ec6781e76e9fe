"""A little language of pictures: what the text-to-image tool draws and the vision-language stage reads.

A scene is a 3 x 3 grid of cells, each empty or holding a coloured shape or a short text. `describe` puts a
scene into English or Chinese, `parse` reads such a description back (`parse(describe(scene, language)) ==
scene`) and understands looser ones as well, `draw` renders it with Pillow alone.

    a small red circle at the top left and a large blue text "CAT" in the center
    左上角有一个小的红色圆形，中间有一个大的蓝色文字“CAT”
"""

import math
import random
import re
from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageDraw, ImageFont

Language = Literal["en", "zh"]

SHAPES = {"circle": "圆形", "square": "正方形", "triangle": "三角形", "star": "五角星"}
COLOURS = {
    "red": "红色",
    "green": "绿色",
    "blue": "蓝色",
    "yellow": "黄色",
    "purple": "紫色",
    "black": "黑色",
}
SIZES = {"small": "小", "large": "大"}
POSITIONS = {  # row by row, so that the index is 3 * row + column
    "top left": "左上角",
    "top": "上方",
    "top right": "右上角",
    "left": "左边",
    "center": "中间",
    "right": "右边",
    "bottom left": "左下角",
    "bottom": "下方",
    "bottom right": "右下角",
}
RGB = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 200, 30),
    "purple": (140, 60, 180),
    "black": (20, 20, 20),
}
BACKGROUND = (255, 255, 255)
MAX_TEXT = 5  # letters and digits that stay readable in one cell
MAX_DESCRIPTION = 1000  # characters

COUNTS = dict(zip("two three four five six seven eight nine".split(), "两三四五六七八九", strict=True))
# Other ways to say the same, for descriptions that people and models write.
SYNONYMS = {
    "circle": "disc disk ball round dot 圆 圆圈 圆点 球",
    "square": "box block 方块 方形",
    "triangle": "三角",
    "star": "星星 星形 星",
    "red": "crimson 红",
    "green": "绿",
    "blue": "蓝",
    "yellow": "gold golden 黄 金色",
    "purple": "violet 紫",
    "black": "黑",
    "small": "little tiny 小的",
    "large": "big huge 大的",
    "top left": "upper-left 左上 左上方",
    "top right": "upper-right 右上 右上方",
    "bottom left": "lower-left 左下 左下方",
    "bottom right": "lower-right 右下 右下方",
    "top": "上面 上边",
    "bottom": "下面 下边",
    "left": "左侧 左面",
    "right": "右侧 右面",
    "center": "centre middle 中央 中心",
    "two": "2 二",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
}
TABLES = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "position": POSITIONS, "count": COUNTS}
MEANING = {  # every word of both languages -> (table, English name)
    word.replace("-", " "): (table, name)
    for table, names in TABLES.items()
    for name, chinese in names.items()
    for word in (name, chinese, *SYNONYMS[name].split())
}
# Longest first, so that 三角形 is a triangle before 三 is three, and "top left" one place.
VOCABULARY = "|".join(
    rf"(?<![a-z0-9]){word.replace(' ', '[ -]')}s?(?![a-z0-9])" if word.isascii() else word
    for word in sorted(MEANING, key=len, reverse=True)
)
WORDS = re.compile(
    r"""(?:number|digits?|word|text|letters?|数字|文字|单词|字母)\s*(?P<named>(?-i:[A-Z0-9]+))"""
    r"""|["“‘](?P<quoted>[^"“”‘’]{1,40})["”’]"""
    rf"""|(?P<word>{VOCABULARY})"""
    r"""|(?P<comma>[,;.，；。、\n])|(?P<and>(?<![a-z])(?:and|with)(?![a-z])|和|与|以及|还有)""",
    re.IGNORECASE,
)


class SceneError(ValueError):
    """The description shows nothing that can be drawn, or something that cannot."""


@dataclass(frozen=True, order=True)
class Item:
    """One thing in a scene."""

    position: str  # a key of POSITIONS
    shape: str  # a key of SHAPES, or "text"
    colour: str  # a key of COLOURS
    size: str = "large"  # a key of SIZES
    text: str = ""  # the letters or digits where shape is "text"


@dataclass(frozen=True)
class Scene:
    """What is in a picture, at most one thing a cell, row by row (`parse` and `random_scene` sort so)."""

    items: tuple[Item, ...]


def reading_order(items: list[Item]) -> Scene:
    order = list(POSITIONS)
    return Scene(tuple(sorted(items, key=lambda item: order.index(item.position))))


def random_scene(rng: random.Random, count: int, text_share: float = 0.0) -> Scene:
    """`count` things (1 to 9) in different cells, each a text with probability `text_share`, else a shape."""
    items = []
    for position in rng.sample(list(POSITIONS), count):
        is_text = rng.random() < text_share
        shape = "text" if is_text else rng.choice(list(SHAPES))
        letters = rng.choice(("0123456789", "ABCDEFGHJKLMNPRSTUVWXYZ"))  # without I, O, Q: like 1 and 0
        text = "".join(rng.choices(letters, k=rng.randint(1, 3))) if is_text else ""
        items.append(Item(position, shape, rng.choice(list(COLOURS)), rng.choice(list(SIZES)), text))
    return reading_order(items)


def name_of(item: Item, language: Language) -> str:
    """What the thing is, without its place: 'a small red circle'."""
    if language == "zh":
        kind = f"文字“{item.text}”" if item.shape == "text" else SHAPES[item.shape]
        return f"{SIZES[item.size]}的{COLOURS[item.colour]}{kind}"
    if item.shape == "text":
        return f'a {item.size} {item.colour} text "{item.text}"'
    return f"a {item.size} {item.colour} {item.shape}"


def place_of(position: str, language: Language) -> str:
    """'at the top left', '左上角'."""
    if language == "zh":
        return POSITIONS[position]
    return f"{'in' if position == 'center' else 'at'} the {position}"


def describe(scene: Scene, language: Language = "en") -> str:
    """The scene as one sentence without a full stop; `parse` turns it back into the same scene."""
    named = [(name_of(item, language), place_of(item.position, language)) for item in scene.items]
    if language == "zh":
        return "，".join(f"{place}有一个{name}" for name, place in named)
    parts = [f"{name} {place}" for name, place in named]
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def parse(description: str) -> Scene:
    """Read a description in English or Chinese, exact or loose.

    Words that are not in the vocabulary are passed over. A thing without colour is black, without size large,
    without position in the first free cell, the center first. Raises SceneError if nothing can be drawn.
    """
    if len(description) > MAX_DESCRIPTION:
        raise SceneError(f"a description longer than {MAX_DESCRIPTION} characters")
    found: list[dict[str, str]] = []
    thing: dict[str, str] = {}
    separator = ""
    for match in WORDS.finditer(description):
        if match["comma"] or match["and"]:
            separator = "and" if match["and"] else separator or "comma"
            continue
        if match["word"]:
            word = match["word"].lower().replace("-", " ")
            kind, value = MEANING.get(word) or MEANING[word.removesuffix("s")]
        else:
            kind, value = "shape", match["named"] or match["quoted"]
        # After "a red circle," an English position still speaks of the circle, a Chinese one of what follows.
        continues = kind == "position" and separator == "comma" and match[0].isascii()
        if "shape" in thing and (kind in thing or separator and not continues):
            found.append(thing)
            thing = {}
        thing[kind] = value
        if not match["word"]:
            thing["text"] = value
        separator = ""
    if "shape" in thing:
        found.append(thing)
    return arrange(found)


def arrange(found: list[dict[str, str]]) -> Scene:
    """Give each thing found in a description its cell and its defaults."""
    counted = []
    for thing in found:
        count = 2 + list(COUNTS).index(thing["count"]) if "count" in thing else 1
        if count > 1 and "position" in thing:
            raise SceneError("several things in one place")
        counted += [thing] * count
    taken = [thing["position"] for thing in counted if "position" in thing]
    if len(set(taken)) < len(taken):
        raise SceneError("two things in the same place")
    free = [position for position in dict.fromkeys(("center", *POSITIONS)) if position not in taken]
    if not 1 <= len(counted) <= len(POSITIONS):
        raise SceneError(f"expected 1 to {len(POSITIONS)} things such as 'a red circle'")
    items = []
    for thing in counted:
        text = thing.get("text", "")
        if text and not (text.isascii() and text.isalnum() and len(text) <= MAX_TEXT):
            raise SceneError(f"can write 1 to {MAX_TEXT} letters a-z or digits")
        position = thing.get("position") or free.pop(0)
        shape = "text" if text else thing["shape"]
        items.append(Item(position, shape, thing.get("colour", "black"), thing.get("size", "large"), text))
    return reading_order(items)


def draw(scene: Scene, size: int = 256) -> Image.Image:
    """The scene as an RGB picture of size x size pixels, drawn four times larger for smooth edges."""
    scale = 4
    cell = size * scale / 3
    image = Image.new("RGB", (size * scale, size * scale), BACKGROUND)
    pen = ImageDraw.Draw(image)
    for item in scene.items:
        row, column = divmod(list(POSITIONS).index(item.position), 3)
        x, y = (column + 0.5) * cell, (row + 0.5) * cell
        radius = cell * (0.44 if item.size == "large" else 0.26)
        colour = RGB[item.colour]
        if item.shape == "circle":
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        elif item.shape == "text":
            font = fitting_font(item.text, radius)
            pen.text((x, y), item.text, fill=colour, anchor="mm", font=font, stroke_width=radius / 20)  # bold
        else:
            pen.polygon(corners(item.shape, x, y, radius), fill=colour)
    return image.resize((size, size), Image.Resampling.BOX)


def corners(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Corners of a square, triangle or star around (x, y), clockwise from the top."""
    count, start = {"square": (4, 45.0), "triangle": (3, 0.0), "star": (10, 0.0)}[shape]
    points = []
    for corner in range(count):
        angle = math.radians(start + 360 * corner / count)
        reach = radius * (0.42 if shape == "star" and corner % 2 else 1.0)
        points.append((x + reach * math.sin(angle), y - reach * math.cos(angle)))
    return points


def fitting_font(text: str, radius: float) -> ImageFont.FreeTypeFont:
    """Pillow's own font at the largest size at which the text stays within its cell."""
    width, height = 2 * radius, 1.6 * radius
    left, top, right, bottom = ImageFont.load_default(100).getbbox(text)
    return ImageFont.load_default(100 * min(width / (right - left), height / (bottom - top)))
