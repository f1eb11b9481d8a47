"""The walk over what an object holds ends quickly at what is no container of Python's."""

from __future__ import annotations

from collections import deque
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
