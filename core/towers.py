"""Small vision encoders trained from scratch on drawn scenes, so that the vision stage runs without a
download.

The published encoders learnt from hundreds of millions of pictures. These learn to say, patch by patch, what
the scene language knows: the DINOv2-like one forms and places, the SigLIP-like one colours and letters. So
each alone leaves questions open that both together can answer. Scenes are crowded here, for more to learn
from each.
"""

import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.optimizer import decay_groups
from core.scenes import COLOURS, POSITIONS, SHAPES, SIZES, Scene, draw, random_scene
from core.vision_checkpoint import save_vision_encoder
from model import VISION_PRESETS, VisionConfig, VisionEncoder, normalise

LETTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# Fields of what a patch shows; class 0 of each is background, or nothing of the kind.
CLASSES = {"shape": len(SHAPES) + 2, "size": len(SIZES) + 1, "colour": len(COLOURS) + 1}
CLASSES["letter"] = len(LETTERS) + 1
CLASSES["row"] = CLASSES["column"] = 3 + 1  # of the patch among the scene's cells, whatever it shows
POOL, TEST = 3000, 200  # scenes to learn from, and to be asked about afterwards
# Each encoder's fields, and its share of the steps.
LEARNT = {"dino-tiny": (("shape", "size", "row", "column"), 0.6), "siglip-tiny": (("colour", "letter"), 1.0)}


def one_letter(scene: Scene) -> Scene:
    """Texts cut to their first letter: what a patch of 16 pixels and a minute of training can hold."""
    return Scene(tuple(replace(item, text=item.text[:1]) for item in scene.items))


def patch_classes(scene: Scene, grid: int) -> Tensor:
    """[grid * grid, fields] int64: what each patch shows, in the order of CLASSES. `grid` is a multiple of
    3."""
    cells = torch.zeros(3, 3, len(CLASSES), dtype=torch.long)
    cells[..., -2], cells[..., -1] = 1 + torch.arange(3)[:, None], 1 + torch.arange(3)
    for item in scene.items:
        known = [
            [*SHAPES, "text"].index(item.shape),
            list(SIZES).index(item.size),
            list(COLOURS).index(item.colour),
        ]
        known += [LETTERS.index(letter) for letter in item.text[:1]]
        cells[divmod(list(POSITIONS).index(item.position), 3)][: len(known)] = 1 + torch.tensor(known)
    return cells.repeat_interleave(grid // 3, 0).repeat_interleave(grid // 3, 1).flatten(0, 1)


def patch_loss(scores: Tensor, classes: Tensor, fields: tuple[str, ...]) -> Tensor:
    """Mean cross-entropy over fields; background, which is most of a picture, counts a fifth.

    scores: [B, patches, sum of the fields' classes]; classes: [B, patches, fields of CLASSES].
    """
    total = scores.new_zeros(())
    for field, part in zip(fields, scores.split([CLASSES[field] for field in fields], dim=-1), strict=True):
        wanted = classes[..., list(CLASSES).index(field)].flatten()
        weight = torch.where(wanted == 0, 0.2, 1.0)
        total = (
            total
            + (F.cross_entropy(part.flatten(0, 1), wanted, reduction="none") * weight).sum() / weight.sum()
        )
    return total / len(fields)


def train_towers(
    folder: Path,
    size: int,
    steps: int,
    batch_size: int,
    seed: int,
    device: torch.device,
    say: Callable[[str], None],
) -> dict[str, float]:
    """Both encoders, for pictures of `size` pixels, into `folder`; what is there already is left as it is.

    Returns the share of new scenes' patches that each made one names rightly, by "encoder/field".
    """
    missing = [name for name in LEARNT if not (folder / name / "config.json").is_file()]
    found: dict[str, float] = {}
    if not missing:
        return found
    pictures, classes = draw_scenes(
        min(POOL, steps * batch_size) + TEST, size, VISION_PRESETS[missing[0]].grid, seed
    )
    for name in missing:
        fields, share = LEARNT[name]
        config = VISION_PRESETS[name]
        config = replace(config, image_size=size, patch_size=size // config.grid)
        own_steps = max(1, round(share * steps))
        encoder, right = train_encoder(config, fields, pictures, classes, own_steps, batch_size, seed, device)
        shares = ", ".join(f"{field} {share:.3f}" for field, share in right.items())
        say(f"{name}: {own_steps} steps, then right on {shares} of new scenes' patches")
        save_vision_encoder(encoder, folder / name)
        found |= {f"{name}/{field}": share for field, share in right.items()}
    return found


def draw_scenes(count: int, size: int, grid: int, seed: int) -> tuple[Tensor, Tensor]:
    """Crowded scenes: pictures [count, 3, size, size] uint8, classes [count, grid * grid, fields] int64."""
    rng = random.Random(seed)
    scenes = [one_letter(random_scene(rng, rng.randint(1, 9), text_share=0.5)) for _ in range(count)]
    pictures = torch.stack(
        [torch.from_numpy(np.array(draw(scene, size))).permute(2, 0, 1) for scene in scenes]
    )
    return pictures, torch.stack([patch_classes(scene, grid) for scene in scenes])


def train_encoder(
    config: VisionConfig,
    fields: tuple[str, ...],
    pictures: Tensor,
    classes: Tensor,
    steps: int,
    batch_size: int,
    seed: int,
    device: torch.device,
) -> tuple[VisionEncoder, dict[str, float]]:
    """(encoder, share of the last TEST scenes' foreground patches that it names rightly, by field)."""
    encoder = VisionEncoder(config, upto=-1, seed=seed).to(device)
    torch.manual_seed(seed)
    head = nn.Linear(config.dim, sum(CLASSES[field] for field in fields)).to(device)
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(decay_groups(parameters, 0.05), betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        chosen = torch.randint(len(pictures) - TEST, (batch_size,), generator=generator)
        pixels = normalise(pictures[chosen].to(device), config)
        loss = patch_loss(head(encoder(pixels, layer=-1)), classes[chosen].to(device), fields)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    with torch.no_grad():
        scores = head(encoder(normalise(pictures[-TEST:].to(device), config), layer=-1)).cpu()
    right = {}
    for field, part in zip(fields, scores.split([CLASSES[field] for field in fields], dim=-1), strict=True):
        wanted = classes[-TEST:, :, list(CLASSES).index(field)]
        right[field] = (part.argmax(-1) == wanted)[wanted > 0].float().mean().item()
    return encoder.cpu(), right
