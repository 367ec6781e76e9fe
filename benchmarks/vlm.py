"""Seeing, timed against transformers on equal shapes: pictures a second through the towers, training tokens a
second.

    python benchmarks/vlm.py [--rounds 5]

Both sides have the same random weights' shapes, one thread, float32, and take turns. Towers: DINOv2 with
registers and SigLIP, to the features of the second-to-last block. Training: LlavaForConditionalGeneration
(SigLIP tower, Mistral language model), tower frozen, one AdamW step, answers a quarter of the words. Ours has
the larger projector (three layers instead of two).
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import PATCH, VISION_PRESETS, VLM, Config, VisionEncoder, VisionTower

SIZE, PATCH_SIZE, PICTURES, WORDS, VOCABULARY = 112, 14, 8, 96, 8192
DINO = replace(VISION_PRESETS["dinov2-large"], image_size=SIZE, dim=192, depth=6, heads=3, mlp=768)
SIGLIP = replace(VISION_PRESETS["siglip-so400m-224"], image_size=SIZE, dim=216, depth=6, heads=3, mlp=806)
PATCHES = DINO.grid**2
WORD_MODEL = Config(vocab_size=VOCABULARY, layers=4, dim=256, heads=4, kv_heads=2, head_dim=64, ffn_dim=704)


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of this process: on a busy machine, less misleading than the clock on the wall."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


def compare(name: str, unit: str, amount: int, ours: Callable, theirs: Callable, rounds: int) -> None:
    ours(), theirs()  # warm up
    times = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
    own, other = (statistics.median(column) for column in zip(*times, strict=True))
    speeds = f"ours {amount / own:9.1f} {unit}/s  transformers {amount / other:9.1f}"
    print(f"{name:10} {speeds}  ratio {other / own:.2f}", flush=True)


def vision_options(config) -> dict:
    return {
        "hidden_size": config.dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "image_size": SIZE,
        "patch_size": PATCH_SIZE,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, 1 thread, float32")

    # The towers
    pixels = torch.randn(PICTURES, 3, SIZE, SIZE)
    pictures = torch.randint(0, 256, (PICTURES, 2, 3, SIZE, SIZE), dtype=torch.uint8)
    tower = VisionTower([VisionEncoder(DINO), VisionEncoder(SIGLIP)])
    dino = Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(**vision_options(DINO), mlp_ratio=4, attn_implementation="sdpa")
    ).eval()
    siglip = SiglipVisionModel(
        SiglipVisionConfig(**vision_options(SIGLIP), intermediate_size=SIGLIP.mlp, attn_implementation="sdpa")
    ).eval()

    @torch.no_grad()
    def theirs() -> None:
        for model in (dino, siglip):
            model(pixels, output_hidden_states=True).hidden_states[-2]

    compare("towers", "pictures", PICTURES, lambda: tower(pictures), theirs, rounds)

    # A training step with one picture a row, the tower included
    eye = VisionTower([VisionEncoder(SIGLIP)])
    model = VLM(WORD_MODEL, eye.dim)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    words = torch.randint(1, VOCABULARY - 1, (PICTURES, WORDS))
    answers = torch.where(torch.arange(WORDS) < 3 * WORDS // 4, -100, words)
    tokens = torch.cat([torch.full((PICTURES, PATCHES), PATCH), words], 1)
    targets = torch.cat([torch.full((PICTURES, PATCHES), -100), answers], 1).roll(-1, 1)
    targets[:, -1] = -100

    def our_step() -> None:
        nats, count = model.loss(tokens, targets, features=eye(pictures[:, :1]))
        (nats / count).backward()
        optimizer.step()
        optimizer.zero_grad()

    peer = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=SiglipVisionConfig(**vision_options(SIGLIP), intermediate_size=SIGLIP.mlp),
            text_config=MistralConfig(
                vocab_size=VOCABULARY,
                hidden_size=WORD_MODEL.dim,
                num_hidden_layers=WORD_MODEL.layers,
                num_attention_heads=WORD_MODEL.heads,
                num_key_value_heads=WORD_MODEL.kv_heads,
                head_dim=WORD_MODEL.head_dim,
                intermediate_size=WORD_MODEL.ffn_dim,
                sliding_window=None,
            ),
            image_token_index=VOCABULARY - 1,
            vision_feature_select_strategy="full",
            vision_feature_layer=-2,
            attn_implementation="sdpa",
        )
    )
    peer.model.vision_tower.requires_grad_(False)
    peer_optimizer = torch.optim.AdamW([p for p in peer.parameters() if p.requires_grad], lr=1e-4, fused=True)
    ids = tokens.masked_fill(tokens == PATCH, VOCABULARY - 1)
    labels = torch.cat([torch.full((PICTURES, PATCHES), -100), answers], 1)

    def their_step() -> None:
        peer(input_ids=ids, pixel_values=pixels, labels=labels).loss.backward()
        peer_optimizer.step()
        peer_optimizer.zero_grad()

    compare("training", "tokens", tokens.numel(), our_step, their_step, rounds)


if __name__ == "__main__":
    main()
