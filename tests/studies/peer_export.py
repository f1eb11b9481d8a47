"""Exports a checkpoint folder by an engine's own exporter, in the engine's environment and without the network.

`python -m tests.studies.peer_export ENGINE DTYPE FOLDER INTO BORROWED`, run by the Python of that environment. What it
lacks, torch above all, is imported from BORROWED, the site-packages of the driver.
"""

import runpy
import sys
from pathlib import Path


def onnxruntime_genai(dtype: str, folder: str, into: str) -> None:
    """Run the model builder, for the CPU; its head computes the last position alone, as every other engine's."""
    precision = {"float32": "fp32", "bfloat16": "bf16"}[dtype]
    scratch = Path(into, "scratch")
    arguments = ["-i", folder, "-o", into, "-p", precision, "-e", "cpu", "-c", str(scratch)]
    sys.argv = ["builder", *arguments, "--extra_options", "prune_lm_head=true"]
    runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__", alter_sys=True)
    if scratch.exists():
        scratch.rmdir()


def openvino(dtype: str, folder: str, into: str) -> None:
    """Run optimum-intel's export (stateful, weights in float32); its head then computes the last position alone.

    OpenVINO GenAI slices there as well, when it loads a model.
    """
    import numpy as np
    import openvino
    from openvino import opset13
    from optimum.intel import OVModelForCausalLM

    exported = OVModelForCausalLM.from_pretrained(
        folder, export=True, compile=False, load_in_8bit=False, local_files_only=True
    )
    model = exported.model
    head = model.output("logits").get_node().input_value(0).get_node()
    if head.get_type_name() != "MatMul":
        raise ValueError(f"the logits come from a {head.get_type_name()}, not from a MatMul")
    last = [opset13.constant(np.array([number])) for number in (-1, np.iinfo(np.int64).max, 1, 1)]
    head.input(0).replace_source_output(opset13.slice(head.input_value(0), *last).output(0))
    model.validate_nodes_and_infer_types()
    openvino.save_model(model, str(Path(into, "openvino_model.xml")), compress_to_fp16=False)


if __name__ == "__main__":
    engine, *arguments, borrowed = sys.argv[1:]
    sys.path.append(borrowed)  # last: the environment's own versions come first
    {"onnxruntime-genai": onnxruntime_genai, "openvino": openvino}[engine](*arguments)
