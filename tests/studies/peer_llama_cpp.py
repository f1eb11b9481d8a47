"""llama.cpp as a peer: libllama out of node-llama-cpp's prebuilt package, by ctypes."""

import ctypes
import json
import os
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from tests.studies.peer_protocol import Emit, Generate, Load

LLAMA_CPP = "KVBENCH_LLAMA_CPP"
"""Environment variable: the folder with llama.cpp's shared libraries."""

CACHE_TYPES = {"float32": 0, "bfloat16": 30, "q8_0": 8, "q4_0": 2}
"""enum ggml_type. llama.cpp's own default is float16, which gives other tokens."""


def build_file() -> Path:
    """Name the file beside llama.cpp's libraries that names their version."""
    return Path(os.environ.get(LLAMA_CPP, ""), "_nlcBuildMetadata.json")


class LlamaCpp:
    """libllama, its best build for this processor."""

    def __init__(self, request: Load) -> None:
        folder = build_file().parent
        build = json.loads(build_file().read_text(encoding="utf-8"))["buildOptions"]["llamaCpp"]
        ctypes.CDLL(str(folder / "libggml-base.so"), ctypes.RTLD_GLOBAL)
        ggml = ctypes.CDLL(str(next(folder.glob("libggml.*so"))), ctypes.RTLD_GLOBAL)
        self._lib = ctypes.CDLL(str(next(folder.glob("libllama.*so"))))
        _declare(self._lib)
        self._quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
        self._lib.llama_log_set(self._quiet, None)
        ggml.ggml_backend_load_all_from_path(str(folder).encode())  # picks the best build for this processor
        path = Path(request.weights, "model.gguf")
        self._model = self._lib.llama_model_load_from_file(str(path).encode(), self._lib.llama_model_default_params())
        if not self._model:
            raise ValueError(f"llama.cpp cannot read {path}")
        settings = self._lib.llama_context_default_params()
        if (settings.n_ctx, settings.n_batch, settings.n_threads, settings.type_k) != (512, 2048, 4, 1):
            raise ValueError(f"llama.cpp {build['release']} lays out its settings otherwise than this binding")
        settings.n_ctx = request.capacity
        settings.n_batch = max(
            settings.n_batch, request.capacity
        )  # a prompt is one call, computed in parts of n_ubatch
        settings.n_threads = settings.n_threads_batch = request.n_threads
        settings.type_k = settings.type_v = CACHE_TYPES[request.kv]
        self._context = self._lib.llama_init_from_model(self._model, settings)
        if not self._context:
            raise ValueError("llama.cpp cannot make a context")
        self._memory = self._lib.llama_get_memory(self._context)
        self._held: list[int] | None = None
        self._vocab_size = self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(self._model))
        flags = self._lib.llama_print_system_info().decode().strip(" |")
        self.description = f"llama.cpp {build['release']} ({flags})"
        self.kv = request.kv

    def prepare(self, request: Generate) -> None:
        if request.context == self._held:  # drop what came after it
            if not self._lib.llama_memory_seq_rm(self._memory, 0, len(self._held), -1):
                raise RuntimeError("llama.cpp cannot shorten its cache")
            return
        self._lib.llama_memory_clear(self._memory, False)
        if request.context:
            self._feed(request.context)
        self._held = request.context

    def generate(self, request: Generate, emit: Emit) -> None:
        fed = request.prompt
        for _ in range(request.n_gen):
            self._feed(fed)
            pointer = self._lib.llama_get_logits_ith(self._context, -1)
            logits = np.ctypeslib.as_array(pointer, (self._vocab_size,))
            token = int(logits.argmax())
            emit(token, logits)
            fed = [token]

    def _feed(self, tokens: list[int]) -> None:
        ids = (ctypes.c_int32 * len(tokens))(*tokens)
        status = self._lib.llama_decode(self._context, self._lib.llama_batch_get_one(ids, len(tokens)))
        if status:
            raise RuntimeError(f"llama_decode returned {status}")


class ModelSettings(ctypes.Structure):
    """llama_model_params, passed on as llama.cpp fills it."""

    _fields_: ClassVar = [("all", ctypes.c_uint64 * 10)]


class ContextSettings(ctypes.Structure):
    """llama_context_params; what is not set here is left without names."""

    _fields_: ClassVar = [
        ("n_ctx", ctypes.c_uint32),
        ("n_batch", ctypes.c_uint32),
        ("sequences", ctypes.c_uint32 * 5),
        ("n_threads", ctypes.c_int32),
        ("n_threads_batch", ctypes.c_int32),
        ("positions", ctypes.c_uint32 * 17),
        ("type_k", ctypes.c_int32),
        ("type_v", ctypes.c_int32),
        ("rest", ctypes.c_uint64 * 6),
    ]


class Batch(ctypes.Structure):
    """llama_batch."""

    _fields_: ClassVar = [("n_tokens", ctypes.c_int32), ("arrays", ctypes.c_void_p * 6)]


def _declare(lib: Any) -> None:
    """Set the signatures of the functions of llama.h that are called here: result, then arguments."""
    pointer = ctypes.c_void_p
    signatures: dict[str, tuple[Any, ...]] = {
        "llama_log_set": (None, pointer, pointer),
        "llama_model_default_params": (ModelSettings,),
        "llama_model_load_from_file": (pointer, ctypes.c_char_p, ModelSettings),
        "llama_model_get_vocab": (pointer, pointer),
        "llama_vocab_n_tokens": (ctypes.c_int32, pointer),
        "llama_context_default_params": (ContextSettings,),
        "llama_init_from_model": (pointer, pointer, ContextSettings),
        "llama_batch_get_one": (Batch, pointer, ctypes.c_int32),
        "llama_decode": (ctypes.c_int32, pointer, Batch),
        "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), pointer, ctypes.c_int32),
        "llama_get_memory": (pointer, pointer),
        "llama_memory_clear": (None, pointer, ctypes.c_bool),
        "llama_memory_seq_rm": (ctypes.c_bool, pointer, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32),
        "llama_print_system_info": (ctypes.c_char_p,),
    }
    for name, (result, *arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
