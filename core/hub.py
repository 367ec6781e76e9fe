"""Models to and from the Hugging Face hub; only ever when asked for.

python -m core.hub pull OWNER/NAME              into the hub's cache; prints the folder
python -m core.hub push FOLDER OWNER/NAME       a model folder and a card; needs `hf auth login`
"""

import json
import sys
from pathlib import Path

import huggingface_hub

from core.checkpoint import read_config, read_json
from core.config import UsageError, UserError, run_main
from model import num_parameters

WANTED = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.safetensors"]


def pull(hub_id: str) -> Path:
    """The local copy of a model, fetched unless the cache has it: safetensors, or where there is none,
    `.bin`."""
    try:
        folder = Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=WANTED))
        if not list(folder.glob("*.safetensors")):
            folder = Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=[*WANTED, "*.bin"]))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(
            f"{hub_id}: no such folder here, and not fetched from the hub ({reason}); check the name and the "
            "network, or give a local folder"
        ) from None
    return folder


def push(folder: str | Path, hub_id: str) -> str:
    """Upload a model folder, with a card unless it has one. Returns its address."""
    folder = Path(folder)
    card = folder / "README.md"
    if not card.exists():
        card.write_text(model_card(folder), encoding="utf-8")
    try:
        huggingface_hub.create_repo(hub_id, exist_ok=True)
        return str(huggingface_hub.upload_folder(repo_id=hub_id, folder_path=folder))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(
            f"{folder}: not pushed to {hub_id} ({reason}); check network, name and login"
        ) from None


def model_card(folder: Path) -> str:
    """README.md of a model folder, from its configuration and, where it lies in a run folder, the run's
    files."""
    config = read_config(folder)
    raw = read_json(folder / "config.json")
    window = f"window {config.sliding_window}" if config.sliding_window else "full attention"
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "---",
        f"# {folder.resolve().parent.name if folder.name == 'model' else folder.name}",
        "",
        f"A {config.architecture} decoder of {num_parameters(config):,} {raw.get('torch_dtype')} parameters: "
        f"{config.layers} layers, width {config.dim}, {config.heads} query and {config.kv_heads} key heads, "
        f"context {config.max_seq_len}, {window}, {config.vocab_size:,} tokens. Trained with nanoMoxin.",
    ]
    for title, name in (("Measured", "summary.json"), ("Training options", "config.json")):
        path = folder.resolve().parent / name
        if path.is_file():
            content = json.dumps(read_json(path), indent=2, ensure_ascii=False)
            lines += ["", f"## {title}", "", "```json", content, "```"]
    return "\n".join(lines) + "\n"


def main() -> None:
    match sys.argv[1:]:
        case ["pull", hub_id]:
            print(pull(hub_id))
        case ["push", folder, hub_id]:
            print(push(folder, hub_id))
        case _:
            raise UsageError("usage: python -m core.hub pull OWNER/NAME | push FOLDER OWNER/NAME")


if __name__ == "__main__":
    run_main(main)
