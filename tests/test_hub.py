"""The hub: what is fetched, what a card says, and one clear line where there is no network."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from core.checkpoint import load_pretrained, save_pretrained
from core.config import UserError
from core.hub import model_card, pull, push
from model import Config, Transformer

CONFIG = Config(vocab_size=50, layers=1, dim=32, heads=2, kv_heads=1, head_dim=16, ffn_dim=40)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_pull_prefers_safetensors(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the hub, which has the folder; `.bin` is asked for only where nothing else came."""
    save_pretrained(Transformer(CONFIG), tmp_path / "there")
    if kind == "bin":
        (tmp_path / "there" / "model.safetensors").unlink()
    asked: list[bool] = []

    def snapshot(hub_id: str, allow_patterns: list[str]) -> str:
        asked.append("*.bin" in allow_patterns)
        return str(tmp_path / "there")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert pull("owner/name") == tmp_path / "there"
    assert asked == ([False] if kind == "safetensors" else [False, True])
    if kind == "safetensors":
        assert load_pretrained("owner/name").config == CONFIG


def test_card(tmp_path: Path) -> None:
    save_pretrained(Transformer(CONFIG), tmp_path / "first-run" / "model")
    (tmp_path / "first-run" / "summary.json").write_text('{"val_loss": 3.25}')
    card = model_card(tmp_path / "first-run" / "model")
    assert "# first-run" in card and "1 layers, width 32" in card and '"val_loss": 3.25' in card
    assert "pipeline_tag: text-generation" in card.split("---")[1]


def test_push_uploads_the_folder_with_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pretrained(Transformer(CONFIG), tmp_path / "model")
    sent: dict[str, Any] = {}
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda hub_id, exist_ok: None)
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **given: sent.update(given) or "address")
    assert push(tmp_path / "model", "owner/name") == "address"
    assert sent["repo_id"] == "owner/name" and (tmp_path / "model" / "README.md").is_file()
    (tmp_path / "model" / "README.md").write_text("mine")
    push(tmp_path / "model", "owner/name")
    assert (tmp_path / "model" / "README.md").read_text() == "mine"


def test_push_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pretrained(Transformer(CONFIG), tmp_path / "model")

    def offline(*given: Any, **options: Any) -> None:
        raise ConnectionError("unreachable\nfor now")

    monkeypatch.setattr(huggingface_hub, "create_repo", offline)
    with pytest.raises(UserError, match="not pushed to owner/name") as caught:
        push(tmp_path / "model", "owner/name")
    assert "\n" not in str(caught.value)


def test_generation_config_names_the_tokens(tmp_path: Path) -> None:
    class Tokenizer:
        bos_id, eos_id, pad_id = 1, 2, None

        def save(self, folder: Path) -> None:
            (folder / "tokenizer.json").write_text("{}")

    save_pretrained(Transformer(CONFIG), tmp_path / "model", Tokenizer())
    settings = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert settings == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    assert json.loads((tmp_path / "model" / "config.json").read_text())["eos_token_id"] == 2
    assert (tmp_path / "model" / "tokenizer.json").exists()
