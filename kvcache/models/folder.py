"""Which files of a checkpoint folder are read, and which folders are refused. No pickle, no code, nothing outside."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from kvcache.models.gguf_header import part_count
from kvcache.models.skeleton import check_decoder_only, one_line, quiet, refusing
from kvcache.models.weight_cache import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_READ = (".safetensors", ".gguf", ".json", ".model", ".txt", ".jinja")
"""Endings of the files that may be read: weights, configuration, tokenizer."""
LFS_POINTER = "version https://git-lfs.github.com/spec/"
"""How the text begins that Git LFS leaves in place of a file until it is pulled."""
_PART = re.compile(r".+-\d{5}-of-(?!00001)\d{5}\.gguf")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tokenizer_config.json")


def weight_files(folder: Path) -> tuple[Path, ...]:
    """List the safetensors files of `folder`, or else its one GGUF file.

    Raises:
        ModelError: the folder is missing, or holds no weights, or none that are read here.
    """
    if not folder.is_dir():
        instead = "is a file: name the folder that holds it" if folder.exists() else "does not exist"
        raise ModelError(f"the folder {folder} {instead}")
    names = sorted(path.name for path in folder.iterdir())
    _refuse_pointers(folder, names)
    if "adapter_config.json" in names:
        raise ModelError(f"the folder {folder} holds an adapter; merge it into its base model and save that")
    if _SINGLE in names:
        return (folder / _SINGLE,)
    if _INDEX in names:
        return _shards(folder)
    ggufs = [name for name in names if name.endswith(".gguf")]
    if any(_PART.fullmatch(name) for name in ggufs):
        raise ModelError(
            f"the folder {folder} holds a GGUF model in parts ({', '.join(ggufs)}), which transformers does not read; "
            "join them with `llama-gguf-split --merge FIRST OUT` and keep OUT alone"
        )
    if len(ggufs) == 1:
        return (_whole(folder / ggufs[0]),)
    if ggufs:
        raise ModelError(f"the folder {folder} holds {len(ggufs)} GGUF files ({', '.join(ggufs)}); keep one of them")
    return _no_weights(folder, names)


def read_config(folder: Path, gguf: str | None = None) -> PreTrainedConfig:
    """Read the configuration in `folder`, or in its GGUF file; weights are not read.

    Raises:
        ModelError: it is missing or broken, wants code of its own, or is not of a decoder-only language model.
    """
    from transformers import AutoConfig

    if gguf is None:
        _check_config_file(folder / "config.json")
    with quiet(), refusing(f"the configuration in {folder}"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            folder, gguf_file=gguf, trust_remote_code=False, local_files_only=True
        )
    check_decoder_only(config)
    return config


def holds_tokenizer(folder: Path) -> bool:
    """Return whether one of the files by which a tokenizer is stored lies in `folder`."""
    return any((folder / name).is_file() for name in _TOKENIZERS)


def fingerprint(folder: Path, weights: tuple[Path, ...]) -> str:
    """Make a name that changes with any file that decides what is loaded.

    Size and time of change stand for the content of large files, which would take long to read.
    """
    place = folder.resolve()
    stats = {path.name: path.stat() for path in sorted({*weights, *folder.glob("*.json")})}
    stamps = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()]
    digest = hashlib.sha256(repr((str(place), stamps)).encode()).hexdigest()
    return f"{re.sub(r'[^A-Za-z0-9.-]+', '-', place.name)}-{digest[:16]}"


def sha256_of(weights: tuple[Path, ...]) -> str:
    """Compute the SHA-256 of the one file; of several, that of the lines which `sha256sum` prints for them."""
    digests = {}
    for path in weights:
        with path.open("rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    if len(digests) == 1:
        return next(iter(digests.values()))
    listing = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(listing.encode()).hexdigest()


def _refuse_pointers(folder: Path, names: list[str]) -> None:
    """Refuse a clone without its large files: Git LFS leaves small texts in their place."""
    pointers = [name for name in names if name.endswith(_READ) and _is_pointer(folder / name)]
    if pointers:
        raise ModelError(
            f"the folder {folder} holds Git LFS pointers in place of {', '.join(pointers)}; run `git lfs pull` in it"
        )


def _is_pointer(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(LFS_POINTER)) == LFS_POINTER.encode()
    except OSError:
        return False  # whoever needs the file will say what is wrong with it


def _shards(folder: Path) -> tuple[Path, ...]:
    """List the files that the index names: all beside it, all safetensors (transformers would unpickle any other)."""
    index = folder / _INDEX
    with refusing(str(index)):
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        for shard in shards:
            if not re.fullmatch(r"[^/\\]+\.safetensors", shard):
                raise ModelError(f"{index} names {shard!r}; valid: safetensors files beside it")
            if not (folder / shard).is_file():
                raise ModelError(f"the folder {folder} lacks {shard}, which {_INDEX} names")
    if not shards:
        raise ModelError(f"{index} names no weights")
    return tuple(folder / shard for shard in shards)


def _whole(gguf: Path) -> Path:
    """Refuse a part of a GGUF model that has another name than llama.cpp gives it."""
    try:
        count = part_count(gguf)
    except (OSError, ValueError, struct.error):
        return gguf  # whoever reads it will say what is wrong with it
    if count > 1:
        raise ModelError(
            f"{gguf} is one of {count} parts of a GGUF model, which transformers does not read; join them with "
            "`llama-gguf-split --merge FIRST OUT` and keep OUT alone"
        )
    return gguf


def _no_weights(folder: Path, names: list[str]) -> tuple[Path, ...]:
    """Say what is wrong with a folder without weights that are read here."""
    if "config.json" not in names:
        raise ModelError(_no_config(folder))
    pickled = next((name for name in names if name.endswith(_PICKLED)), None)
    if pickled is not None:
        raise ModelError(
            f"the folder {folder} holds pickled weights only ({pickled}), which are never read because they can run "
            "code; valid: safetensors (save_pretrained writes them) or a GGUF file"
        )
    raise ModelError(f"the folder {folder} holds no weights; valid: {_SINGLE}, {_INDEX} or a GGUF file")


def _no_config(folder: Path) -> str:
    return f"the folder {folder} holds no config.json; valid: what save_pretrained writes, or a folder with a GGUF file"


def _check_config_file(path: Path) -> None:
    """Say what is wrong with a config.json in fewer words than transformers does."""
    from transformers import CONFIG_MAPPING

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(_no_config(path.parent)) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not readable JSON ({one_line(error)})") from error
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise ModelError(f"{path} names no model_type; valid: the config.json that save_pretrained writes")
    if content["model_type"] not in CONFIG_MAPPING:
        own_code = ", and the code that comes with it (auto_map) is never run" if "auto_map" in content else ""
        raise ModelError(f"{path}: model type {content['model_type']!r} is not known to transformers{own_code}")
    if "transformers_weights" in content:  # could name a pickled adapter
        raise ModelError(f"{path} names a weights file of its own (transformers_weights); valid: {_SINGLE}")
