"""A model that sees, opened for questions: pictures and words in, answers out, many at a time.

seer = Seer("runs/vlm-tiny/model")
features = seer.look([Path("a.png"), Path("b.png")])
seer.answer(["What colour is the star?", "Describe the picture."], list(features.split(1)))
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from core.generate import generate
from core.vlm_checkpoint import load_vlm, load_vlm_tower
from data.chat import render
from data.picture_batches import render_pure
from data.pictures import Row, Source, load_picture, prepare
from data.replies import end_ids
from data.tokenizer import load_tokenizer
from model import PATCH


class Seer:
    """A folder of `save_vlm` with its tokenizer, its encoders and the format in which it was taught."""

    def __init__(
        self, folder: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> None:
        self.model, self.device = load_vlm(folder, dtype, device).eval(), device
        tower, settings = load_vlm_tower(folder)
        self.tower, self.resize, self.chat_format = (
            tower.to(device, dtype),
            settings["resize"],
            settings["chat_format"],
        )
        self.tokenizer = load_tokenizer(folder)
        moss = self.chat_format == "moss"
        self.stop_ids = end_ids(self.tokenizer, "<eom>") if moss else (self.tokenizer.eos_id,)

    def look(self, pictures: Sequence[Source], at_once: int = 32) -> Tensor:
        """[pictures, patches, dim]. Raises BadPicture for what is none."""
        means = tuple(config.mean for config in self.tower.configs)
        seen = []
        for start in range(0, len(pictures), at_once):
            opened = [load_picture(picture) for picture in pictures[start : start + at_once]]
            pixels = [prepare(picture, self.tower.image_size, self.resize, means) for picture in opened]
            seen.append(self.tower(torch.stack(pixels).to(self.device)))
        return torch.cat(seen)

    def prompt(self, question: str, pictures: int = 1) -> list[int]:
        """Ids of a question about so many pictures, up to where its answer begins."""
        content = [{"type": "image"}] * pictures + [{"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        if self.chat_format == "caption":  # was taught without questions
            ids = render_pure(Row(messages, [None] * pictures), self.tokenizer, questions=False)[0]
        elif self.chat_format == "pure":
            ids = render_pure(Row(messages, [None] * pictures), self.tokenizer)[0]
        else:
            ids = render([*messages, {"role": "assistant"}], self.tokenizer, self.chat_format).ids
        return [token for i in ids for token in ([i] if i != PATCH else [PATCH] * self.tower.tokens)]

    def answer(
        self,
        questions: Sequence[str],
        features: Sequence[Tensor | None],
        max_new_tokens: int = 32,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[str]:
        """One answer a question; `features` [its pictures, patches, dim] of `look`, or None."""
        prompts = [
            self.prompt(question, 0 if seen is None else len(seen))
            for question, seen in zip(questions, features, strict=True)
        ]
        made = generate(
            self.model,
            prompts,
            max_new_tokens,
            temperature=temperature,
            stop_ids=self.stop_ids,
            seed=seed,
            tokenizer=self.tokenizer,
            features=features,
        )
        texts = []
        for (completion,) in made:
            ended = completion.finish_reason == "stop"
            texts.append(self.tokenizer.decode(completion.tokens[: -1 if ended else None]).strip())
        return texts
