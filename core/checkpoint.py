"""Model folders in Hugging Face format, in and out: Mistral, Llama and CodeGen / MOSS.

Two tables, of configuration fields and of tensor names, drive both directions. Weights go one tensor at a
time, so a folder fills an already built model, sharded or not, and the host never holds more than the target
and one shard. Only JSON, safetensors and, through torch's restricted unpickler, `.bin` tensors are read.
"""

import json
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from core.config import UserError
from core.vision_checkpoint import load_vision_encoder as load_vision_encoder  # offered here too
from model import Config, Transformer

SHARD_BYTES = 5_000_000_000

# Field of Config -> key of config.json.
SHARED_KEYS = {"vocab_size": "vocab_size", "tied": "tie_word_embeddings", "init_std": "initializer_range"}
LLAMA_KEYS = SHARED_KEYS | {
    "layers": "num_hidden_layers",
    "dim": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn_dim": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
}
CODEGEN_KEYS = SHARED_KEYS | {
    "layers": "n_layer",
    "dim": "n_embd",
    "heads": "n_head",
    "ffn_dim": "n_inner",
    "max_seq_len": "n_positions",
    "rotary_dim": "rotary_dim",
    "norm_eps": "layer_norm_epsilon",
}
# Keys that change what a model computes, and the values that model.py computes; None = absent or null.
ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", None),
    "activation_function": ("gelu_new", None),  # the tanh approximation of GELU
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "rope_scaling": (None,),
    "partial_rotary_factor": (1.0, None),
    "layer_types": (None,),
    "quantization_config": (None,),
}
# Buffers that old folders carry along; they follow from config.json. Matched at the end of a name.
NOT_WEIGHTS = (".rotary_emb.inv_freq", ".attn.causal_mask", ".attn.bias", ".attn.masked_bias")


# Configuration


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. UserError if the file is absent or is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; is {path.parent} a model folder?") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); fetch it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}; fetch it again")
    return value


def read_config(folder: str | Path) -> Config:
    """config.json as our Config. The number of vocabulary rows is that of the stored embedding, which some
    trainers pad without saying so.

    UserError for another family, a missing or ill-typed key, and any key that would change the result but
    that model.py does not compute (scaled rotary positions, biases, quantised weights ...).
    """
    path = Path(folder) / "config.json"
    config = parse_config(read_json(path), path)
    embedding = next(name for name, ours in tensor_names(config).items() if ours == ["embed.weight"])
    for file in weight_files(Path(folder)):
        with open_tensors(file) as (names, get):
            if embedding in names:
                return replace(config, vocab_size=get(embedding).shape[0])
    raise UserError(f"{folder}: no file holds {embedding!r}; fetch the model again, a shard is missing")


def parse_config(raw: dict[str, Any], path: Path) -> Config:
    """The content of a config.json as a Config; `path` is for messages."""
    family = {"moss": "codegen"}.get(raw.get("model_type"), raw.get("model_type"))
    if family not in ("mistral", "llama", "codegen"):
        raise UserError(f"{path}: model_type {family!r} is none of mistral, llama, codegen, moss")
    for key, allowed in ONLY.items():
        if raw.get(key) not in allowed:
            raise UserError(f"{path}: {key} = {raw[key]!r} is not supported, only {allowed[0]!r}")
    given = {key: value for key, value in raw.items() if value is not None}
    rope = given.get("rope_parameters", {})  # newer folders keep rope_theta in here
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default" or len(rope) > 2:
        raise UserError(f"{path}: rope_parameters = {rope!r} is not supported, only plain rotary positions")
    given = {"rope_theta": 10_000.0, "tie_word_embeddings": False, "initializer_range": 0.02} | rope | given

    def get(ours: str, key: str) -> Any:
        kind = Config.__annotations__[ours]
        if key not in given:
            raise UserError(f"{path}: {key!r} is missing; restore it from the model's original config.json")
        if type(given[key]) is not kind and not (kind is float and type(given[key]) is int):
            raise UserError(f"{path}: {key} = {given[key]!r}, expected {kind.__name__}")
        return kind(given[key])

    keys = CODEGEN_KEYS if family == "codegen" else LLAMA_KEYS
    dim, heads = get("dim", keys["dim"]), max(1, get("heads", keys["heads"]))
    values: dict[str, Any] = {"architecture": family}
    if family == "codegen":
        given = {"n_inner": 4 * dim} | given
        values |= {"norm": "layer", "parallel_block": True, "mlp": "gelu", "head_bias": True}
        values |= {"kv_heads": heads, "head_dim": dim // heads}
    else:
        given = {"head_dim": dim // heads} | given
    if family == "llama":
        given = {"num_key_value_heads": heads} | given  # older than grouped-query attention
        if "sliding_window" in given:
            raise UserError(f"{path}: a llama has no sliding_window; a model that has is a mistral")
    if family == "mistral":
        # null = none; absent = that of Mistral-7B-v0.1, the format's default
        given = {"sliding_window": 0 if "sliding_window" in raw else 4096} | given
        keys = keys | {"sliding_window": "sliding_window"}
    try:
        return Config(**values, **{ours: get(ours, key) for ours, key in keys.items()})
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def config_json(config: Config) -> dict[str, Any]:
    """The config.json of a model. UserError if its family cannot express the Config."""
    family = config.architecture
    config = replace(config, rotary_dim=config.rotary)
    keys = CODEGEN_KEYS if family == "codegen" else LLAMA_KEYS
    raw = {"model_type": family} | {key: getattr(config, ours) for ours, key in keys.items()}
    if family == "codegen":
        raw |= {"architectures": ["CodeGenForCausalLM"], "activation_function": "gelu_new"}
    else:
        raw |= {"architectures": [f"{family.capitalize()}ForCausalLM"], "hidden_act": "silu"}
    if family == "mistral":
        raw["sliding_window"] = config.sliding_window or None
    understood = parse_config(raw, Path("config.json"))
    understood = replace(understood, rotary_dim=understood.rotary)
    for field in fields(Config):
        value = getattr(config, field.name)
        if getattr(understood, field.name) != value:
            raise UserError(f"a {family} folder cannot say {field.name} = {value!r}; nothing was saved")
    return raw


# Tensor names


def tensor_names(config: Config) -> dict[str, list[str]]:
    """Stored tensor -> our parameter, or, for CodeGen's packed projection, our three (q, k, v)."""
    if config.architecture == "codegen":
        outer = {"transformer.wte": ["embed"], "transformer.ln_f": ["norm"], "lm_head": ["head"]}
        inner = {
            "ln_1": ["attention_norm"],
            "attn.qkv_proj": ["attention.q", "attention.k", "attention.v"],
            "attn.out_proj": ["attention.o"],
            "mlp.fc_in": ["mlp.up"],
            "mlp.fc_out": ["mlp.down"],
        }
        stem, biased = "transformer.h", {"transformer.ln_f", "lm_head", "ln_1", "mlp.fc_in", "mlp.fc_out"}
    else:
        outer = {"model.embed_tokens": ["embed"], "model.norm": ["norm"], "lm_head": ["head"]}
        inner = {
            "input_layernorm": ["attention_norm"],
            "self_attn.q_proj": ["attention.q"],
            "self_attn.k_proj": ["attention.k"],
            "self_attn.v_proj": ["attention.v"],
            "self_attn.o_proj": ["attention.o"],
            "post_attention_layernorm": ["mlp_norm"],
            "mlp.gate_proj": ["mlp.gate"],
            "mlp.up_proj": ["mlp.up"],
            "mlp.down_proj": ["mlp.down"],
        }
        stem, biased = "model.layers", set()
    names = {}
    for theirs, ours in outer.items():
        kinds = ["weight"] * (theirs != "lm_head" or not config.tied) + ["bias"] * (theirs in biased)
        names |= {f"{theirs}.{kind}": [f"{part}.{kind}" for part in ours] for kind in kinds}
    for layer in range(config.layers):
        for theirs, ours in inner.items():
            for kind in ["weight"] + ["bias"] * (theirs in biased):
                names[f"{stem}.{layer}.{theirs}.{kind}"] = [f"layers.{layer}.{part}.{kind}" for part in ours]
    return names


def rotate_half_rows(config: Config) -> Tensor:
    """Order of a head's rows that turns rotary pairs (0, 1), (2, 3) ... into (0, R/2), (1, R/2 + 1) ..."""
    rows = torch.arange(config.head_dim)
    return torch.cat((rows[: config.rotary : 2], rows[1 : config.rotary : 2], rows[config.rotary :]))


def unpack_qkv(packed: Tensor, config: Config) -> list[Tensor]:
    """CodeGen's qkv [3D, D] -> q, k, v [D, D]. It lies in 4 blocks, left by the model parallelism of its
    training, each holding its heads' q, then v, then k."""
    q, v, k = packed.view(4, 3, -1, packed.shape[-1]).unbind(1)
    q, k = (x.reshape(config.heads, config.head_dim, -1)[:, rotate_half_rows(config)] for x in (q, k))
    return [x.reshape(-1, packed.shape[-1]) for x in (q, k, v)]


def pack_qkv(q: Tensor, k: Tensor, v: Tensor, config: Config) -> Tensor:
    """The inverse of `unpack_qkv`."""
    back = rotate_half_rows(config).argsort()
    q, k = (x.view(config.heads, config.head_dim, -1)[:, back] for x in (q, k))
    blocks = [x.reshape(4, -1, v.shape[-1]) for x in (q, v, k)]
    return torch.stack(blocks, 1).reshape(-1, v.shape[-1])


# Reading


def weight_files(folder: Path) -> list[Path]:
    """The folder's weight files: those its index names, whatever their names; safetensors before `.bin`."""
    for pattern in ("*.safetensors", "*.bin"):
        for index in sorted(folder.glob(f"{pattern}.index.json")):
            named = sorted(set(read_json(index).get("weight_map", {}).values()))
            for name in named:
                if not (folder / name).is_file():
                    raise UserError(f"{folder / name}: missing, though {index.name} names it; fetch it again")
            if named:
                return [folder / name for name in named]
        for single in ("model.safetensors", "pytorch_model.bin"):
            if Path(single).match(pattern) and (folder / single).is_file():
                return [folder / single]
        files = [path for path in sorted(folder.glob(pattern)) if path.name != "training_args.bin"]
        if files:
            return files
    raise UserError(f"{folder}: no weights (*.safetensors or *.bin); fetch the model again")


@contextmanager
def open_tensors(path: Path) -> Iterator[tuple[list[str], Callable[[str], Tensor]]]:
    """(names, get) of one weight file, memory-mapped: a tensor costs memory only once it is got."""
    try:
        if path.suffix == ".safetensors":
            names = list(safe_open(path, framework="pt").keys())

            def get(name: str) -> Tensor:
                # Opened for each tensor: what was mapped of the file counts as ours until it is closed.
                return safe_open(path, framework="pt").get_tensor(name)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
                raise UserError(f"{path}: expected a dictionary of tensors; is it a model's weights?")
            names, get = list(state), state.__getitem__
    except pickle.UnpicklingError:
        raise UserError(f"{path}: refused: damaged, or would run code when opened; get safetensors") from None
    except (SafetensorError, RuntimeError, OSError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be read, probably cut short ({reason}); fetch it again") from None
    yield names, get


def load_pretrained(
    folder_or_hub_id: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Transformer:
    """The model in a folder or on the hub. UserError names the file that is wrong and the remedy."""
    folder = resolve_folder(folder_or_hub_id)
    with torch.device("meta"):
        model = Transformer(read_config(folder)).to(dtype)
    model.to_empty(device=device)
    if model.config.tied:
        model.head.weight = model.embed.weight
    load_weights(model, folder)
    return model


def resolve_folder(folder_or_hub_id: str | Path) -> Path:
    """A local folder as it is; `owner/name` is fetched from the hub into its cache."""
    folder = Path(folder_or_hub_id)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(folder_or_hub_id)):
        raise UserError(f"{folder}: no such folder; give a model folder or a hub id, owner/name")
    from core.hub import pull

    return pull(str(folder_or_hub_id))


@torch.no_grad()
def load_weights(model: Transformer, folder: str | Path) -> None:
    """Fill a model, on any device and possibly sharded (each process then keeps its part), from a folder.

    Raises UserError for a tensor that is missing, unknown or of another shape.
    """
    parameters = dict(model.named_parameters())
    wanted = tensor_names(model.config)
    missing, head_copy = dict(wanted), None
    for path in weight_files(Path(folder)):
        with open_tensors(path) as (names, get):
            for name in names:
                if name.endswith(NOT_WEIGHTS):
                    continue
                if name == "lm_head.weight" and model.config.tied:
                    head_copy = path  # the embedding stored again; compared below, when all files are read
                    continue
                if name not in wanted:
                    raise UserError(f"{path}: {name!r} does not belong to the model in config.json")
                targets = [parameters[ours] for ours in wanted[name]]
                shape = [sum(p.shape[0] for p in targets), *targets[0].shape[1:]]
                tensor = get(name)
                if list(tensor.shape) != shape:
                    raise UserError(f"{path}: {name} is {list(tensor.shape)}, config.json implies {shape}")
                if not tensor.is_floating_point():
                    raise UserError(f"{path}: {name} is {tensor.dtype}; get the model before quantisation")
                parts = unpack_qkv(tensor, model.config) if len(targets) == 3 else [tensor]
                for parameter, part in zip(targets, parts, strict=True):
                    fill(parameter, part)
                missing.pop(name, None)
    if missing:
        first = next(iter(missing))
        raise UserError(
            f"{folder}: {first!r} and {len(missing) - 1} more tensors are in no file; fetch it again"
        )
    if head_copy is not None:
        with open_tensors(head_copy) as (_, get):
            fill(copy := torch.empty_like(model.embed.weight), get("lm_head.weight"))
        if not copy.equal(model.embed.weight):
            raise UserError(f"{head_copy}: lm_head.weight is not the embedding, though config.json ties them")


def fill(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into a parameter; a sharded one takes its own part, without communication."""
    if isinstance(parameter, DTensor):
        value = value.to(parameter.device, parameter.dtype)
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(value)


# Writing


@torch.no_grad()
def save_pretrained(
    model: Transformer, folder: str | Path, tokenizer: Any = None, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a folder that `transformers` opens, in the parameters' dtype, complete or not at all.

    Collective: under FSDP every process calls it, each tensor is gathered in turn and rank 0 writes. A model
    folder that is there is replaced; any other non-empty folder is refused.
    """
    target = Path(folder)
    config, names = config_json(model.config), tensor_names(model.config)
    parameters = dict(model.named_parameters())
    if not {part for ours in names.values() for part in ours} <= parameters.keys():
        raise UserError(f"{target}: a quantised model cannot be saved; save it before quantising")
    sizes = {name: sum(parameters[part].nbytes for part in ours) for name, ours in names.items()}
    shards = plan_shards(sizes, shard_bytes)
    main = not dist.is_initialized() or dist.get_rank() == 0
    partial = target.with_name(f".{target.name}.partial")
    if main:
        occupied = target.is_dir() and any(target.iterdir())
        if occupied and not (
            (target / "config.json").is_file() and "model_type" in read_json(target / "config.json")
        ):
            raise UserError(f"{target}: holds something other than a model; choose another folder")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = f"model{part}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        tensors = {}
        for name in shard:
            parts = [gather(parameters[ours], main) for ours in names[name]]
            if main:
                tensors[name] = parts[0] if len(parts) == 1 else pack_qkv(*parts, model.config)
        if main:
            try:
                save_file(tensors, partial / file, metadata={"format": "pt"})
            except SafetensorError as error:
                shutil.rmtree(partial, ignore_errors=True)
                raise UserError(
                    f"{target}: cannot write {file} ({error}); make room and save again"
                ) from None
    if main:
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            _write_json(partial / "model.safetensors.index.json", index)
        ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_id", None) for kind in ("bos", "eos", "pad")}
        dtype = str(next(iter(parameters.values())).dtype).removeprefix("torch.")
        _write_json(partial / "config.json", config | ids | {"torch_dtype": dtype})
        _write_json(partial / "generation_config.json", ids)
        if tokenizer is not None:
            tokenizer.save(partial)
        replace_folder(partial, target)
    if dist.is_initialized():
        dist.barrier()


def plan_shards(sizes: dict[str, int], shard_bytes: int) -> list[list[str]]:
    """Tensor names in order, cut into files of at most `shard_bytes`; a larger tensor has its own file."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def gather(parameter: nn.Parameter, keep: bool) -> Tensor | None:
    """A parameter whole and on the host; None where it is not kept. Collective if it is sharded."""
    whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return whole.detach().cpu().contiguous() if keep else None


def replace_folder(partial: Path, target: Path) -> None:
    """Put a finished folder in another's place."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
