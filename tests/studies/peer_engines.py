"""The engines that `peers` measures beside kvbench, each behind `Engine`: generate greedily from token ids.

An engine is imported where it is loaded: in a process of its own, of an environment that holds it.
"""

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.studies.peer_llama_cpp import LLAMA_CPP, LlamaCpp, build_file
from tests.studies.peer_protocol import Emit, Engine, Generate, Load

PYTHONS = {"onnxruntime-genai": "KVBENCH_ONNXRUNTIME_GENAI", "openvino": "KVBENCH_OPENVINO"}
"""Engines with an environment of their own: environment variables that name its Python."""

OPENVINO_DTYPES = {"float32": "f32", "bfloat16": "bf16"}


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
        self._end = [str(request.absent)]
        self.description = f"CTranslate2 {ctranslate2.__version__}"
        self.kv = request.kv

    def prepare(self, request: Generate) -> None:
        """Do nothing: the first run keeps what it computed of a static prompt, and nothing else stays."""

    def generate(self, request: Generate, emit: Emit) -> None:
        def callback(step: Any) -> bool:
            emit(step.token_id, None)
            return False

        self._generator.generate_batch(
            [[str(token) for token in request.prompt]],
            max_length=request.n_gen,
            end_token=self._end,
            include_prompt_in_result=False,
            static_prompt=[str(token) for token in request.context] or None,
            callback=callback,
        )


class OnnxRuntimeGenai:
    """onnxruntime-genai's Generator on the CPU, on what its model builder wrote."""

    def __init__(self, request: Load) -> None:
        import onnxruntime
        import onnxruntime_genai

        self._library = onnxruntime_genai
        config = onnxruntime_genai.Config(request.weights)
        session = {"intra_op_num_threads": request.n_threads, "inter_op_num_threads": 1}
        overlay = {"model": {"eos_token_id": [request.absent], "decoder": {"session_options": session}}}
        config.overlay(json.dumps(overlay))
        self._model = onnxruntime_genai.Model(config)
        settings = onnxruntime_genai.GeneratorParams(self._model)
        settings.set_search_options(max_length=request.capacity, do_sample=False, batch_size=1)
        self._generator = onnxruntime_genai.Generator(self._model, settings)
        self._held: list[int] | None = None
        self.description = f"onnxruntime-genai {onnxruntime_genai.__version__}, onnxruntime {onnxruntime.__version__}"
        self.kv = request.kv

    def prepare(self, request: Generate) -> None:
        if self._held is not None:
            self._generator.rewind_to(len(self._held) if self._held == request.context else 0)
        if self._held != request.context and request.context:
            self._generator.append_tokens(np.array(request.context, dtype=np.int32))
        self._held = request.context

    def generate(self, request: Generate, emit: Emit) -> None:
        self._generator.append_tokens(np.array(request.prompt, dtype=np.int32))
        for step in range(request.n_gen):
            logits = self._generator.get_logits().reshape(-1) if request.logits and not step else None
            self._generator.generate_next_token()
            emit(int(self._generator.get_next_tokens()[0]), logits)


class OpenVino:
    """OpenVINO's CPU plugin on the stateful model that optimum-intel exported, fed token by token.

    As OpenVINO GenAI does it, the head computes the last position alone (`peer_export`).
    """

    def __init__(self, request: Load) -> None:
        import openvino

        core = openvino.Core()
        able = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if request.dtype == "bfloat16" and "BF16" not in able:
            raise ValueError(f"it computes in {', '.join(sorted(able))} on this processor, not in bfloat16")
        settings: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": request.n_threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
        }
        if request.kv:
            settings["INFERENCE_PRECISION_HINT"] = OPENVINO_DTYPES[request.dtype]
            settings["KV_CACHE_PRECISION"] = OPENVINO_DTYPES.get(request.kv, request.kv)
        compiled = core.compile_model(str(Path(request.weights, "openvino_model.xml")), "CPU", settings)
        computes_in = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        kept_in = compiled.get_property("KV_CACHE_PRECISION").to_string()
        if computes_in != OPENVINO_DTYPES[request.dtype]:
            raise ValueError(f"left to its default it computes in {computes_in} on this processor")
        self._request = compiled.create_infer_request()
        self._inputs = {name for port in compiled.inputs for name in port.get_names()}
        self.description = f"OpenVINO {openvino.__version__}"
        self.kv = next((dtype for dtype, word in OPENVINO_DTYPES.items() if word == kept_in), kept_in)

    def prepare(self, request: Generate) -> None:
        self._request.reset_state()
        self._length = 0
        if request.context:
            self._feed(request.context)

    def generate(self, request: Generate, emit: Emit) -> None:
        fed = request.prompt
        for _ in range(request.n_gen):
            logits = self._feed(fed)
            token = int(logits.argmax())
            emit(token, logits)
            fed = [token]

    def _feed(self, tokens: list[int]) -> np.ndarray:
        """Feed tokens after those in the cache; return the logits of the last one, `[vocab]`."""
        start, self._length = self._length, self._length + len(tokens)
        given = {
            "input_ids": np.array([tokens], dtype=np.int64),
            "attention_mask": np.ones((1, self._length), dtype=np.int64),
            "position_ids": np.arange(start, self._length, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, dtype=np.int32),
        }
        self._request.infer({name: array for name, array in given.items() if name in self._inputs}, share_inputs=True)
        logits: np.ndarray = self._request.get_tensor("logits").data[0, -1]
        return logits


ENGINES: dict[str, Callable[[Load], Engine]] = {
    "ctranslate2": CTranslate2,
    "llama.cpp": LlamaCpp,
    "onnxruntime-genai": OnnxRuntimeGenai,
    "openvino": OpenVino,
}


def python_of(engine: str) -> str:
    """Return the Python that runs `engine`; raises ImportError where the engine is not installed."""
    if engine == "ctranslate2" and importlib.util.find_spec("ctranslate2") is None:
        raise ImportError("CTranslate2 is not installed")
    if engine == "llama.cpp" and not build_file().exists():
        raise ImportError(f"llama.cpp is not installed: {LLAMA_CPP} names no folder with node-llama-cpp's libraries")
    if engine not in PYTHONS:
        return sys.executable
    python = os.environ.get(PYTHONS[engine], "")
    if not os.access(python, os.X_OK):
        raise ImportError(f"{engine} is not installed: {PYTHONS[engine]} names no Python")
    return python
