"""What is mapped from a file leaves the process's memory, and no value changes, whoever still holds it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvcache.compiled.architectures.catalogue import describe
from kvcache.compiled.pages import leave_pages
from tests.tiny import ARCHITECTURES

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are taken out by Linux's madvise")

VALUES = torch.arange(2.0**22)


def mapped_bytes() -> int:
    """Resident memory of this process that files are mapped to."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile"))


def mapped(folder: Path) -> dict[str, torch.Tensor]:
    save_file({"after": torch.ones(64), "before": torch.ones(64), "weight": VALUES}, folder / "weights")
    return load_file(folder / "weights")


def test_pages_of_a_file_leave_and_come_back_from_it(tmp_path: Path) -> None:
    tensors = mapped(tmp_path)
    weight = tensors["weight"]
    assert weight.sum() > 0  # every page of it is read
    before = mapped_bytes()
    leave_pages(weight)
    assert before - mapped_bytes() > 0.9 * weight.nbytes
    assert torch.equal(weight, VALUES)
    assert tensors["before"].sum() == tensors["after"].sum() == 64


def test_what_was_written_to_the_mapping_is_kept(tmp_path: Path) -> None:
    weight = mapped(tmp_path)["weight"]
    weight[2**21] = -1.0
    leave_pages(weight)
    assert weight[2**21] == -1.0


def test_memory_that_comes_from_no_file_is_kept() -> None:
    weight = VALUES.clone()
    leave_pages(weight)
    assert torch.equal(weight, VALUES)


def test_gpt2_laid_out_anew_keeps_every_value_and_so_does_what_others_hold(tmp_path: Path) -> None:
    model = ARCHITECTURES["gpt2"](n_embd=256)
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    save_file(values, tmp_path / "weights")
    held = load_file(tmp_path / "weights")
    model.load_state_dict(held, assign=True, strict=False)
    held["transformer.h.0.mlp.c_fc.weight"][0, 0] = 7.0
    for _ in range(2):  # the second time the weights lie as they should
        describe(model)
    found = dict(model.named_parameters())
    assert found["transformer.h.0.mlp.c_fc.weight"][0, 0] == held["transformer.h.0.mlp.c_fc.weight"][0, 0] == 7.0
    values["transformer.h.0.mlp.c_fc.weight"][0, 0] = 7.0
    for name, value in values.items():
        assert torch.equal(found[name], value), name
        assert torch.equal(held[name], value), name
