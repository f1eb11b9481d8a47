"""The walk over what an object holds finds all of its memory once, and ends quickly at what is no container."""

import array
import ctypes
import functools
import io
import mmap
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kvcache.caches import held_bytes as walker
from kvcache.caches.held_bytes import held_bytes


@pytest.mark.parametrize("array", [np.array(0.5), np.zeros(10**6)], ids=["no axes", "a million numbers"])
def test_an_array_is_not_taken_to_pieces(array: np.ndarray) -> None:
    visited: dict[int, object] = {}
    assert len(list(walker._tensors([array, torch.ones(4)], visited))) == 1
    assert len(visited) == 3  # the list, the array, the tensor


def test_modules_and_ranges_are_passed_over() -> None:
    visited: dict[int, object] = {}
    assert not list(walker._tensors([torch, range(10**9)], visited))
    assert len(visited) == 3


def test_every_container_of_tensors_counts_each_storage_once() -> None:
    ones = [torch.ones(4) for _ in range(5)]
    held = SimpleNamespace(a=[ones[0]], b=(ones[1], ones[0][:2]), c={ones[2]}, d=deque([ones[3]]), e={"x": ones[4]})
    assert held_bytes(held) == 5 * 16


def test_memory_that_torch_and_numpy_share_counts_once() -> None:
    array = np.zeros(100, dtype=np.float32)
    assert held_bytes([array, array[10:], torch.from_numpy(array)]) == 400
    tensor = torch.ones(50)
    assert held_bytes(tensor[10:].numpy()) == held_bytes([tensor, tensor.numpy()]) == 200


def test_what_is_no_tensor_and_holds_memory_counts() -> None:
    assert held_bytes([bytes(1000), bytearray(100), memoryview(bytes(10))]) == 1110
    assert held_bytes(array.array("d", [1.0, 2.0])) == 16
    assert held_bytes([(ctypes.c_float * 4)(), io.BytesIO(bytes(10)), mmap.mmap(-1, 4096), b""]) == 16 + 10 + 4096
    of_objects = np.full(2, None)
    of_objects[0] = torch.ones(2)
    assert held_bytes(of_objects) == 2 * 8 + 8


def test_memory_of_python_that_a_tensor_shares_counts_once(tmp_path: Path) -> None:
    room = bytearray(400)
    assert held_bytes([room, torch.frombuffer(room, dtype=torch.float32), np.frombuffer(room, np.uint8)]) == 400
    mapped = np.memmap(tmp_path / "rows", np.float32, "w+", shape=(10, 10))
    assert held_bytes([mapped, mapped[2:], torch.from_numpy(mapped)]) == 400
    closed = mmap.mmap(-1, 4096)
    closed.close()
    assert held_bytes(closed) == 0


def test_views_at_an_offset_of_memory_that_is_held_count_once() -> None:
    array, room = np.zeros((2, 100), np.float32), bytearray(800)
    assert held_bytes([array, torch.from_numpy(array[0]), torch.from_numpy(array[1])]) == 800
    assert held_bytes([torch.from_numpy(array[1][10:]), torch.from_numpy(array[1][:20])]) >= 400
    assert held_bytes([room, torch.frombuffer(room, dtype=torch.float32, offset=400)]) == 800


def test_memory_of_a_model_that_is_seen_at_an_offset_is_left_out() -> None:
    model = torch.nn.Linear(8, 8, bias=False)
    assert held_bytes([model.weight.detach().numpy()[1:], torch.ones(4)], leaving_out=model) == 16


class WithQuantState(torch.nn.Parameter):
    """As bitsandbytes' `Params4bit`."""


class Private:
    __slots__ = ("__rows",)

    def __init__(self) -> None:
        self.__rows = torch.zeros(1000)


class OneSlot:
    __slots__ = "rows"  # noqa: PLC0205  # Python takes it, too

    def __init__(self) -> None:
        self.rows = torch.zeros(1000)


class Wrapper(torch.Tensor):
    """Wraps tensors, or none, and says nothing of what it is made of."""

    @staticmethod
    def __new__(cls, *_: torch.Tensor) -> "Wrapper":
        return torch.Tensor._make_wrapper_subclass(cls, (1000,), dtype=torch.float32)  # type: ignore[attr-defined, no-any-return]

    def __init__(self, *parts: torch.Tensor) -> None:
        for number, part in enumerate(parts):
            setattr(self, f"part{number}", part)

    @classmethod
    def __torch_dispatch__(cls, *_: object) -> None:
        raise NotImplementedError


def with_scale(tensor: torch.Tensor) -> torch.Tensor:
    tensor.scale = torch.zeros(1000)  # type: ignore[attr-defined]
    return tensor


def with_defaults(pool: list[torch.Tensor] = [torch.zeros(1000)], *, more: torch.Tensor = torch.zeros(10)) -> None:  # noqa: B006, B008
    """Hold tensors as defaults."""


@pytest.mark.parametrize(
    ("holder", "size"),
    [
        (lambda: with_scale(torch.zeros(10, dtype=torch.int8)), 10 + 4000),
        (lambda: with_scale(WithQuantState(torch.zeros(10), requires_grad=False)), 40 + 4000),
        (Private, 4000),
        (OneSlot, 4000),
        (lambda: with_defaults, 4000 + 40),
        (lambda: torch.UntypedStorage(1000), 1000),
        (lambda: Wrapper(torch.zeros(1000, dtype=torch.int8), torch.zeros(1000)), 5000),
    ],
)
def test_memory_is_found_wherever_a_holder_keeps_it(holder: Callable[[], object], size: int) -> None:
    assert held_bytes(holder()) == size


@pytest.mark.filterwarnings("ignore:.*quantize_per_channel")
def test_scales_and_zero_points_of_channels_count() -> None:
    channels = torch.arange(1, 101) * 0.1, torch.zeros(100, dtype=torch.long)
    codes = torch.quantize_per_channel(torch.ones(100, 4), *channels, 0, torch.qint8)
    scales = [codes.q_per_channel_scales(), codes.q_per_channel_zero_points()]
    assert held_bytes(codes) == 400 + sum(part.nbytes for part in scales)


def test_a_tensor_that_cannot_be_counted_is_named() -> None:
    with pytest.raises(
        TypeError, match=r"^the bytes of .*test_held_bytes.Wrapper cannot be counted: it has no storage"
    ):
        held_bytes(Wrapper())


def test_functions_hold_what_they_close_over() -> None:
    ones = [torch.ones(4) for _ in range(3)]

    def inner() -> torch.Tensor:
        return ones[0]

    assert held_bytes(inner) == 48
    assert held_bytes(functools.partial(print, torch.ones(4), end=torch.ones(4))) == 32
    assert held_bytes(torch.nn.Linear(4, 4, bias=False).forward) == 64


def test_tensors_without_a_storage_of_their_own_count_by_their_parts() -> None:
    dense = torch.eye(4)
    assert held_bytes(dense.to_sparse()) == 2 * 4 * 8 + 4 * 4
    for compressed in (torch.sparse_csr_tensor, torch.sparse_csc_tensor):
        assert held_bytes(compressed(torch.arange(5), torch.arange(4), torch.ones(4))) == 5 * 8 + 4 * 8 + 4 * 4
    assert held_bytes(torch.empty(1000, device="meta")) == 0
    assert held_bytes(dense.to_mkldnn()) == 64
