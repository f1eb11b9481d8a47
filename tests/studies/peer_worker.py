"""One process = one peer: another inference engine, that generates greedily when told and sleeps otherwise.

Knows nothing of torch, whose threads and allocator must not meet the engine's own. Reads a JSON document a line on
standard input and answers on standard output: first `Load`, answered by the engine's description, then `Generate`s,
each answered by `Generated`; `Failure` where it cannot.
"""

import ctypes
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Protocol

import msgspec
import numpy as np

LLAMA_CPP = "KVBENCH_LLAMA_CPP"
"""Environment variable: the folder with llama.cpp's shared libraries."""


class Load(msgspec.Struct, frozen=True, kw_only=True, tag="load"):
    """Load the weights in the folder `weights` into `engine`."""

    engine: str
    weights: str
    dtype: str
    n_threads: int
    capacity: int


class Generate(msgspec.Struct, frozen=True, kw_only=True, tag="generate"):
    """Emit `n_gen` tokens after `prompt`, from an empty cache; `absent` is a token that is not among them."""

    prompt: list[int]
    n_gen: int
    absent: int


class Generated(msgspec.Struct, frozen=True, kw_only=True, tag="generated"):
    """The tokens, and the time from the start (or the token before) until each was known, in ns."""

    tokens: list[int]
    ns: list[int]


class Loaded(msgspec.Struct, frozen=True, kw_only=True, tag="loaded"):
    """What was loaded: the engine with its version and what it says of the processor."""

    description: str


class Failure(msgspec.Struct, frozen=True, kw_only=True, tag="failure"):
    """The request failed, in one line."""

    error: str


Request = Load | Generate
Reply = Loaded | Generated | Failure


class Engine(Protocol):
    """What generates."""

    description: str

    def generate(self, request: Generate, emit: Callable[[int], None]) -> None:
        """Call `emit` with each token as soon as it is known; `reset` came before, untimed."""

    def reset(self) -> None:
        """Forget the sequence generated last."""


class CTranslate2:
    """CTranslate2's Generator. It feeds all of the prompt but the last token at once, and that one as a first step."""

    def __init__(self, request: Load) -> None:
        import ctranslate2

        dtypes = ctranslate2.get_supported_compute_types("cpu")
        if request.dtype not in dtypes:
            raise ValueError(f"it computes in {', '.join(sorted(dtypes))} on this processor, not in {request.dtype}")
        self._generator = ctranslate2.Generator(
            request.weights, device="cpu", compute_type=request.dtype, inter_threads=1, intra_threads=request.n_threads
        )
        self.description = f"CTranslate2 {ctranslate2.__version__}"

    def generate(self, request: Generate, emit: Callable[[int], None]) -> None:
        def callback(step: Any) -> bool:
            emit(step.token_id)
            return False

        self._generator.generate_batch(
            [[str(token) for token in request.prompt]],
            max_length=request.n_gen,
            end_token=[str(request.absent)],  # end-of-sequence is a token like any other here
            include_prompt_in_result=False,
            callback=callback,
        )

    def reset(self) -> None:
        """Nothing is kept from call to call."""


class LlamaCpp:
    """libllama out of node-llama-cpp's prebuilt package, which has a build for every kind of x86-64 processor."""

    def __init__(self, request: Load) -> None:
        folder = _llama_cpp_build().parent
        build = json.loads(_llama_cpp_build().read_text(encoding="utf-8"))["buildOptions"]["llamaCpp"]
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
        settings.n_threads = settings.n_threads_batch = request.n_threads
        # Its cache is float16 unless told otherwise, which gives other tokens.
        settings.type_k = settings.type_v = {"float32": 0, "bfloat16": 30}[request.dtype]  # enum ggml_type
        self._context = self._lib.llama_init_from_model(self._model, settings)
        if not self._context:
            raise ValueError("llama.cpp cannot make a context")
        self._vocab_size = self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(self._model))
        flags = self._lib.llama_print_system_info().decode().strip(" |")
        self.description = f"llama.cpp {build['release']} ({flags})"

    def generate(self, request: Generate, emit: Callable[[int], None]) -> None:
        fed = request.prompt
        for _ in range(request.n_gen):
            ids = (ctypes.c_int32 * len(fed))(*fed)
            status = self._lib.llama_decode(self._context, self._lib.llama_batch_get_one(ids, len(fed)))
            if status:
                raise RuntimeError(f"llama_decode returned {status}")
            logits = self._lib.llama_get_logits_ith(self._context, -1)
            token = int(np.ctypeslib.as_array(logits, (self._vocab_size,)).argmax())
            emit(token)
            fed = [token]

    def reset(self) -> None:
        """Empty the cache."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), False)


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
    """The signatures of the functions of llama.h that are called here: result, then arguments."""
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
        "llama_print_system_info": (ctypes.c_char_p,),
    }
    for name, (result, *arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments


def check_installed(engine: str) -> None:
    """Raise ImportError where `engine` is not installed; `nox -s study -- peers` installs both."""
    if engine == "ctranslate2" and importlib.util.find_spec("ctranslate2") is None:
        raise ImportError("CTranslate2 is not installed")
    if engine == "llama.cpp" and not _llama_cpp_build().exists():
        raise ImportError(f"llama.cpp is not installed: {LLAMA_CPP} names no folder with node-llama-cpp's libraries")


def _llama_cpp_build() -> Path:
    """The file beside llama.cpp's libraries that tells their version."""
    return Path(os.environ.get(LLAMA_CPP, ""), "_nlcBuildMetadata.json")


ENGINES: dict[str, Callable[[Load], Engine]] = {"ctranslate2": CTranslate2, "llama.cpp": LlamaCpp}


def generated(engine: Engine, request: Generate) -> Generated:
    """One turn."""
    tokens: list[int] = []
    stamps: list[int] = []

    def emit(token: int) -> None:
        stamps.append(time.perf_counter_ns())
        tokens.append(token)

    engine.reset()
    start = time.perf_counter_ns()
    engine.generate(request, emit)
    return Generated(tokens=tokens, ns=np.diff([start, *stamps]).tolist())


def serve() -> None:
    """Serve on standard input and output; what an engine prints goes to standard error."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    decode = msgspec.json.Decoder(Request).decode
    engine: Engine | None = None
    for line in sys.stdin.buffer:
        reply: Reply
        try:
            request = decode(line)
            if isinstance(request, Load):
                engine = ENGINES[request.engine](request)
                reply = Loaded(description=engine.description)
            else:
                assert engine is not None
                reply = generated(engine, request)
        except Exception as error:  # noqa: BLE001  # whatever an engine raises is told to whoever asked
            reply = Failure(error=" ".join(f"{type(error).__name__}: {error}".split()))
        replies.write(msgspec.json.encode(reply) + b"\n")
        replies.flush()


if __name__ == "__main__":
    serve()
