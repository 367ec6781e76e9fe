"""The scene language: descriptions read back, loose ones are understood, pictures show the scene."""

import random

import numpy as np
import pytest
from PIL import Image

from core import scenes
from core.scenes import Item, Scene, SceneError, describe, draw, parse, random_scene


@pytest.mark.parametrize("language", ["en", "zh"])
def test_descriptions_read_back(language):
    rng = random.Random(0)
    for _ in range(500):
        scene = random_scene(rng, rng.randint(1, 9), text_share=0.3)
        assert parse(describe(scene, language)) == scene


def test_descriptions_are_these_sentences():
    word = Item("center", "text", "blue", "large", "CAT")
    scene = Scene((Item("top left", "circle", "red", "small"), word))
    assert describe(scene) == 'a small red circle at the top left and a large blue text "CAT" in the center'
    assert describe(scene, "zh") == "左上角有一个小的红色圆形，中间有一个大的蓝色文字“CAT”"


@pytest.mark.parametrize(
    ("description", "exact"),
    [
        ("a red circle", "a large red circle in the center"),
        ("Please draw me a TINY green triangle!", "a small green triangle in the center"),
        ("two blue stars", "a large blue star at the top left and a large blue star in the center"),
        ("box, red star top-left", "a large red star at the top left and a large black square in the center"),
        ("disc, red box at left", "a large red square at the left and a large black circle in the center"),
        ("画一个红圆", "中间有一个大的红色圆形"),
        ("红色圆形，左边有一个小的蓝色方块", "左边有一个小的蓝色正方形，中间有一个大的红色圆形"),
        ("上方是黄色三角和右下角的星星", "上方有一个大的黄色三角形，右下角有一个大的黑色五角星"),
        ("the number 42 in the middle", 'a large black text "42" in the center'),
        ('write "HELLO" in red at the top', 'a large red text "HELLO" at the top'),
    ],
)
def test_loose_descriptions(description, exact):
    assert describe(parse(description), "en" if exact.isascii() else "zh") == exact


@pytest.mark.parametrize(
    "description",
    [
        "",
        "a cat on a mat",
        "red, large, at the top",
        "a red circle at the top and a blue circle at the top",
        "two red circles in the center",
        "nine circles and a star",
        'the word "antidisestablishmentarianism"',
        'the text "<eoc>"',
        "circle " * 1000,
    ],
)
def test_what_cannot_be_drawn_is_refused(description):
    with pytest.raises(SceneError):
        parse(description)


def cells(image: Image.Image) -> dict[str, np.ndarray]:
    """The pixels [n, n, 3] of each cell of the grid."""
    rows = np.split(np.asarray(image).astype(int), 3)
    split = [cell for row in rows for cell in np.split(row, 3, axis=1)]
    return dict(zip(scenes.POSITIONS, split, strict=True))


@pytest.mark.parametrize("size", [48, 96, 225])
def test_pictures_show_the_scene(size):
    """Every thing is in its cell, nearer to its colour than to any other, and nothing is elsewhere."""
    rng = random.Random(1)
    for _ in range(20):
        scene = random_scene(rng, rng.randint(1, 9), text_share=0.3)
        image = draw(scene, size)
        assert image.mode == "RGB" and image.size == (size, size)
        filled = {item.position: item for item in scene.items}
        for position, pixels in cells(image).items():
            if position not in filled:
                assert (pixels == scenes.BACKGROUND).all()
                continue
            darkest = pixels.reshape(-1, 3)[np.abs(pixels - scenes.BACKGROUND).sum(-1).argmax()]
            distance = {name: np.abs(darkest - rgb).sum() for name, rgb in scenes.RGB.items()}
            if filled[position].shape != "text" or size > 48:  # hair lines of small letters are pale
                assert min(distance, key=distance.get) == filled[position].colour


def test_sizes_and_shapes_look_different():
    def ink(**changes):
        item = {"position": "center", "shape": "circle", "colour": "black", "size": "large", **changes}
        return int((np.asarray(draw(Scene((Item(**item),)), 90)) < 128).all(-1).sum())

    areas = {shape: ink(shape=shape) for shape in ("circle", "square", "triangle", "star")}
    assert areas["circle"] > areas["square"] > areas["triangle"] > areas["star"] > 0
    assert all(ink(shape=shape, size="small") < 0.5 * area for shape, area in areas.items())
    assert areas["circle"] == pytest.approx(3.1416 * (0.44 * 30) ** 2, rel=0.05)


def test_drawing_is_deterministic():
    scene = random_scene(random.Random(3), 5, 0.4)
    assert draw(scene, 64).tobytes() == draw(parse(describe(scene, "zh")), 64).tobytes()
