"""A Llama-like model of kvbench in the formats of its peers, with the same numbers.

All come from the float32 model as transformers holds it, so a difference in speed is never one of the weights. Token
ids are all that the engines are given and asked for: the vocabulary that they must have is made of the ids themselves.
"""

import hashlib
import os
import subprocess
import sysconfig
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from bench.measure.server_process import TREE
from kvcache import models
from kvcache.models.weight_cache import ModelError, made_once
from tests.studies.peer_engines import python_of

ONE_FILE = ("ctranslate2", "openvino")
"""Engines that read the float32 weights and compute in the data type they are loaded with."""


class ExportFailed(Exception):
    """An engine's own exporter did not export; the message is its last line."""


def converted(engine: str, model: str, dtype: str) -> Path:
    """Find where the weights of `model` lie for `engine`, converted once into kvbench's cache folder.

    Raises:
        ModelError: there is no such model, its architecture is not Llama's, or the cache folder cannot be written.
        ImportError: the engine is not installed.
        ExportFailed: the engine's own exporter refused.
    """
    digest = hashlib.sha256(models.weights_digest(model, seed=0).encode()).hexdigest()[:16]
    if engine in ONE_FILE:  # for every data type: what it computes in is chosen when it is loaded
        dtype = "float32"

    def make(folder: Path) -> None:
        loaded = models.load(model, dtype="float32", seed=0)
        if not isinstance(loaded.config, LlamaConfig):
            raise ModelError(f"{model} is of type {loaded.config.model_type}; peers are given models of type llama")
        write(engine, loaded, dtype, folder)

    name = f"peers-{digest}-{exporter(engine)}-{dtype}"
    return made_once(name, make, note=f"converting {model} to {dtype} for {engine} once into the cache")


def write(engine: str, model: PreTrainedModel, dtype: str, folder: Path) -> None:
    """Write `model` into `folder` as `engine` reads it; raises as `converted` does."""
    if engine == "ctranslate2":
        write_ctranslate2(model, folder)
    elif engine == "llama.cpp":
        write_gguf(model, dtype, folder / "model.gguf")
    else:
        write_by_exporter(engine, model, dtype, folder)


def exporter(engine: str) -> str:
    """Name what writes the format of `engine`, with its version; that of an environment is in its folder's name."""
    package = {"ctranslate2": "ctranslate2", "llama.cpp": "gguf"}.get(engine)
    return f"{package}-{version(package)}" if package else Path(python_of(engine)).parents[1].name


def write_by_exporter(engine: str, model: PreTrainedModel, dtype: str, folder: Path) -> None:
    """Write `model` by the engine's own exporter (`peer_export`), in the engine's environment, offline."""
    with tempfile.TemporaryDirectory() as checkpoint:
        model.save_pretrained(checkpoint)
        words = {str(token): token for token in range(model.config.vocab_size)}
        special = {"unk_token": "0", "eos_token": "0"}  # they must be some; none is ever used
        tokenizer = Tokenizer(WordLevel(words, special["unk_token"]))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(checkpoint)
        arguments = [engine, dtype, checkpoint, str(folder), sysconfig.get_path("purelib")]
        done = subprocess.run(
            [python_of(engine), "-m", "tests.studies.peer_export", *arguments],
            cwd=TREE,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise ExportFailed(f"its exporter failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")


@torch.inference_mode()
def write_ctranslate2(model: PreTrainedModel, folder: Path) -> None:
    """Write `model` as CTranslate2 stores it, by its own loader for Llama, which takes the model apart."""
    from ctranslate2.converters.transformers import LlamaLoader

    spec = LlamaLoader().get_model_spec(model)
    spec.register_vocabulary([str(token) for token in range(model.config.vocab_size)])
    for special in ("bos_token", "eos_token", "unk_token"):  # they must be some; none is ever used
        setattr(spec.config, special, "0")
    spec.config.layer_norm_epsilon = model.config.rms_norm_eps
    spec.validate()
    spec.optimize(quantization=None)
    spec.save(str(folder))


@torch.inference_mode()
def write_gguf(model: PreTrainedModel, dtype: str, path: Path) -> None:
    """Write `model` as GGUF, its matrices in `dtype` and its vectors in float32, as llama.cpp's own files have them."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    matrix_type = {"float32": gguf.GGMLQuantizationType.F32, "bfloat16": gguf.GGMLQuantizationType.BF16}[dtype]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = weight.numpy()
        if ".q_proj." in name or ".k_proj." in name:
            array = _interleaved(array, config.head_dim)
        is_matrix = array.ndim > 1
        stored = gguf.quants.quantize(array, matrix_type) if is_matrix else array
        gguf_name = names.get_name(name, (".weight", ".bias"))
        if gguf_name is None:
            raise ValueError(f"GGUF has no name for {name}")
        writer.add_tensor(gguf_name, stored, raw_dtype=matrix_type if is_matrix else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleaved(array: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of a query or key projection as GGUF has them: a head's two halves, which rotary turns in pairs, zipped."""
    rest = array.shape[1:]
    return array.reshape(-1, 2, head_dim // 2, *rest).swapaxes(1, 2).reshape(array.shape)
