"""Folders of models that see: the language model's, and in it vision/ with projector, encoders and settings.

Text-only programs open such a folder as the language model it holds. Moxin-VLM's published weights are read
in both layouts they come in.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from core.checkpoint import (
    fill,
    gather,
    load_weights,
    read_config,
    read_json,
    replace_folder,
    save_pretrained,
    tensor_names,
)
from core.config import UserError
from core.vision_checkpoint import Tensors, load_vision_tower, open_weights, save_vision_encoder
from model import VLM, Config, VisionTower


def save_vlm(
    model: VLM, tower: VisionTower, folder: str | Path, tokenizer: Any = None, **settings: str
) -> None:
    """The language model as `save_pretrained` writes it, and beside it vision/: projector, encoders,
    settings.

    Text-only programs open the folder as the language model it holds. Collective; the main process writes.
    """
    folder = Path(folder)
    save_pretrained(model, folder, tokenizer)
    main = not dist.is_initialized() or dist.get_rank() == 0
    projector = {name: gather(tensor, main) for name, tensor in model.projector.named_parameters()}
    if main:
        partial = folder / ".vision.partial"
        for number, encoder in enumerate(tower.encoders):
            save_vision_encoder(encoder, partial / f"encoder_{number}")
        save_file(projector, partial / "projector.safetensors", metadata={"format": "pt"})
        (partial / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        replace_folder(partial, folder / "vision")
    if dist.is_initialized():
        dist.barrier()


def load_projector(model: VLM, folder: str | Path) -> None:
    """Fill the projector, possibly sharded, from a folder of `save_vlm`."""
    tensors = Tensors([Path(folder) / "vision" / "projector.safetensors"])
    fill_all(model.projector, tensors, "", folder)


@torch.no_grad()
def fill_all(module: nn.Module, tensors: Tensors, prefix: str, source: str | Path) -> None:
    """Copy tensors of equal names into all parameters of a module. UserError names one that is missing or
    unlike."""
    for name, parameter in module.named_parameters():
        if prefix + name not in tensors or tensors[prefix + name].shape != parameter.shape:
            raise UserError(f"{source}: no tensor {prefix + name!r} of shape {list(parameter.shape)}")
        fill(parameter, tensors[prefix + name])


def load_vlm(
    folder: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> VLM:
    """The model of a folder of `save_vlm`, without the encoders: `load_vlm_tower` reads those."""
    folder = Path(folder)
    if not (folder / "vision").is_dir():
        raise UserError(f"{folder}: no vision/ in this folder, so it cannot see; vlm.py makes one that can")
    with safe_open(folder / "vision" / "projector.safetensors", framework="pt") as file:
        vision_dim = file.get_slice("fc1.weight").get_shape()[1]
    with torch.device("meta"):
        model = VLM(read_config(folder), vision_dim).to(dtype)
    model.to_empty(device=device)
    if model.config.tied:
        model.head.weight = model.embed.weight
    load_weights(model, folder)
    load_projector(model, folder)
    return model


def load_vlm_tower(folder: str | Path) -> tuple[VisionTower, dict[str, str]]:
    """The encoders of a folder of `save_vlm`, and how pictures and conversations are prepared for it."""
    place = Path(folder) / "vision"
    return load_vision_tower(*sorted(place.glob("encoder_*"))), read_json(place / "config.json")


@torch.no_grad()
def load_published_vlm(
    source: str | Path, shape: Config, tower: VisionTower | None = None
) -> tuple[VLM, VisionTower]:
    """Moxin-VLM as published: Prismatic's `latest-checkpoint.pt` (without encoders: give `tower`), or a
    folder in openvla's Hugging Face layout.

    Args:
        shape: of the language model; its vocabulary is read from the embedding.
    """
    tensors, _ = open_weights(source)
    is_prismatic = "model.projector.projector.0.weight" in tensors
    stem = "model.llm_backbone.llm." if is_prismatic else "language_model."
    embedding = f"{stem}model.embed_tokens.weight"
    if embedding not in tensors:
        raise UserError(f"{source}: neither Prismatic's nor openvla's layout (no tensor {embedding!r})")
    tower = tower or load_vision_tower(source)
    shape = replace(shape, vocab_size=tensors[embedding].shape[0])
    with torch.device("meta"):
        model = VLM(shape, tower.dim)
    model.to_empty(device="cpu")
    parameters = dict(model.named_parameters())
    for theirs, ours in tensor_names(shape).items():
        if stem + theirs not in tensors:
            raise UserError(f"{source}: tensor {stem + theirs!r} is missing")
        fill(parameters[ours[0]], tensors[stem + theirs])
    for number in (1, 2, 3):
        place = f"model.projector.projector.{2 * number - 2}." if is_prismatic else f"projector.fc{number}."
        fill_all(model.projector.get_submodule(f"fc{number}"), tensors, place, source)
    return model, tower
