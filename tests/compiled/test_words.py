"""Integers in words: what is read and summed without taking them apart is what taking them apart gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvcache.compiled.words import Packing

PACKINGS = [Packing(bits=8), Packing(bits=4)]
WORDS = 3


def integers_of(packing: Packing, seed: int, rows: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, WORDS * packing.per_word)
    return torch.randint(-packing.limit, packing.limit + 1, shape, generator=generator, dtype=torch.int32)


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
@given(seed=st.integers(0, 2**31))
def test_what_is_packed_comes_back(packing: Packing, seed: int) -> None:
    integers = integers_of(packing, seed)
    assert torch.equal(packing.unpack(packing.pack(integers)), integers.float())


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_the_largest_of_either_sign_come_back_beside_each_other(packing: Packing) -> None:
    signs = torch.cartesian_prod(*[torch.tensor([-1, 1], dtype=torch.int32)] * packing.per_word)
    integers = packing.limit * signs
    assert torch.equal(packing.unpack(packing.pack(integers)), integers.float())


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
@given(seed=st.integers(0, 2**31))
def test_sums_of_reads_are_sums_of_integers(packing: Packing, seed: int) -> None:
    integers = integers_of(packing, seed)
    words = packing.pack(integers)
    generator = torch.Generator().manual_seed(seed)
    query, weights = torch.randn(integers.shape[1], generator=generator), torch.rand(5, 1, generator=generator)
    reads = [packing.read(words, i) for i in range(packing.per_word)]
    products = sum(read * factor for read, factor in zip(reads, packing.factors(query), strict=True))
    assert isinstance(products, Tensor)
    torch.testing.assert_close(products.sum(-1), integers.float() @ query, rtol=1e-5, atol=1e-5 * packing.limit)
    summed = packing.sums(torch.stack([(read * weights).sum(0) for read in reads]))
    torch.testing.assert_close(summed, (integers * weights).sum(0), rtol=1e-5, atol=1e-5 * packing.limit)
