"""What a model computes while it runs, counted operation by operation: exact on any machine, no clock.

The counts are checked against the formulas of costs.py, for every architecture. torch.utils.flop_counter is not enough:
it has no formula for attention on the CPU (it counts 0), and does not tell GEMM from GEMV.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from math import prod
from typing import Any

from torch import Tensor, nn
from torch._C import DispatchKey
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel


class OperationCounter(TorchDispatchMode):
    """The counts since `count_operations` was entered, over the whole batch; plain integers, readable at any time.

    A product is two FLOPs per multiply-add. It is a GEMM if it has more than one row, else a GEMV. Rows are
    batch x positions for a product with weights, and query positions for attention, whatever shape the kernel is given
    (grouped heads come as rows, experts see the tokens that routing sends them).
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.gemm_flops = 0
        self.gemv_flops = 0
        self.forward_calls = 0
        self.tokens_processed = 0
        """Batch x positions fed, over all forwards."""
        self.lm_head_positions = 0
        """Batch x positions that the LM head was computed for."""
        self.cache_growth_bytes = 0
        """Bytes of keys and values that were copied again because rows were appended to them by concatenation."""
        self.copied_bytes = 0
        """Bytes written by every operation that only moves data, the growth of a cache among them."""
        self.expert_flops = 0
        """Those of products with the weights of experts."""
        self.expanded_bytes = 0
        """Bytes that products with weights made of rows that were fed before: keys and values out of stored latents."""
        self.paused = False
        """Whether operations run without being counted. (Leaving the mode inside inference mode would break torch.)"""
        output = model.get_output_embeddings()
        self._head = _address(output.weight) if output is not None else 0
        self._weights = {_storage_address(parameter) for parameter in model.parameters()}
        self._batch_size = self._positions = 1
        self._in_tables = self._in_experts = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count `func` if it is known, else take it apart (inference mode hands over `linear` and the like whole)."""
        if self.paused:
            return func(*args, **(kwargs or {}))
        name = _name(func)
        if name not in _KNOWN and _is_composite(func):
            with self:  # not decompose(), which has other kernels for some: the numbers must stay the same bit for bit
                return func._op_dk(DispatchKey.CompositeImplicitAutograd, *args, **(kwargs or {}))  # noqa: SLF001
        result = func(*args, **(kwargs or {}))
        if name in _ATTENTION:
            query, key, value = (tensor.shape for tensor in args[:3])
            self._add(self._positions, 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1]))
        elif name in _PRODUCTS:
            left, right = args[_PRODUCTS[name] :][:2]
            rows, flops = self._rows(left, right), 2 * result.numel() * left.shape[-1]
            self._add(rows, flops)
            if self._in_experts:
                self.expert_flops += flops
            elif rows > self._batch_size * self._positions and _storage_address(right) in self._weights:
                self.expanded_bytes += result.nbytes
            if _address(right) == self._head:
                self.lm_head_positions += prod(left.shape[:-1])
        elif name in _COPIES:
            self.copied_bytes += result.nbytes
            if name == "aten.cat" and result.dim() == 4 and (args[1:] or (0,))[0] % 4 == 2:
                # [batch, heads, tokens, head_dim] lengthened by tokens, the new ones last: a cache grows.
                self.cache_growth_bytes += sum(tensor.nbytes for tensor in args[0][:-1])
        return result

    def _add(self, rows: int, flops: int) -> None:
        if self._in_tables:
            return
        if rows > 1:
            self.gemm_flops += flops
        else:
            self.gemv_flops += flops

    def _rows(self, left: Tensor, right: Tensor) -> int:
        if self._in_experts:
            return self._batch_size * self._positions
        if left.dim() == 2 or _storage_address(right) in self._weights:
            return prod(left.shape[:-1])
        return self._positions

    def feed(self, ids: Tensor) -> None:
        """Note that a forward of `ids [batch, positions]` begins: what follows has so many rows."""
        self._batch_size, self._positions = ids.shape[:2]
        self.forward_calls += 1
        self.tokens_processed += self._batch_size * self._positions

    def watch(self, model: PreTrainedModel, stack: ExitStack, *, forwards: bool = True) -> None:
        """Put hooks on the modules that say what the products in them are, until `stack` is closed.

        Without `forwards` the model's own calls are not taken for what is fed: `feed` is called for each instead.
        """

        def forward(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            possible = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
            self.feed(next(given for given in possible if given is not None))

        def inside(flag: str, module: nn.Module) -> None:
            stack.enter_context(module.register_forward_pre_hook(lambda *_: setattr(self, flag, True)))
            stack.enter_context(module.register_forward_hook(lambda *_: setattr(self, flag, False), always_call=True))

        if forwards:
            stack.enter_context(model.register_forward_pre_hook(forward, with_kwargs=True))
        for module in model.modules():
            if not any(True for _ in module.parameters()) and any(True for _ in module.buffers()):
                inside("_in_tables", module)  # cosines and sines of rotary embeddings: tables, not the model's products
            elif any(parameter.dim() == 3 for parameter in module.parameters(recurse=False)):
                inside("_in_experts", module)  # transformers stacks experts as [experts, out, in]


@contextmanager
def count_operations(model: PreTrainedModel) -> Iterator[OperationCounter]:
    """Count what `model` computes inside the block, whoever calls it.

    Kernels that torch does not dispatch one by one (a compiled graph, flash-attention packages) are not seen.

    >>> with count_operations(model) as counted:  # doctest: +SKIP
    ...     strategy.prefill(prompt)
    >>> counted.gemm_flops, counted.lm_head_positions  # doctest: +SKIP
    """
    counter = OperationCounter(model)
    with ExitStack() as stack:
        counter.watch(model, stack)
        stack.enter_context(counter)
        yield counter


def _address(tensor: Tensor) -> int:
    """Return where the tensor's numbers begin; on the meta device, where there are none, its storage."""
    return _storage_address(tensor) if tensor.is_meta else tensor.data_ptr()


def _storage_address(tensor: Tensor) -> int:
    """Return what views of one storage have in common; on the meta device every address is 0."""
    storage = tensor.untyped_storage()
    return storage._cdata if tensor.is_meta else storage.data_ptr()  # noqa: SLF001  # the identity of a storage


@cache
def _name(func: Any) -> str:
    return str(func.overloadpacket)


@cache
def _is_composite(func: Any) -> bool:
    """Whether torch runs `func` as a row of other operations, each of which the counter then sees."""
    return bool(func.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd))


_PRODUCTS = {
    "aten.mm": 0,
    "aten.bmm": 0,
    "aten.addmm": 1,
    "aten.baddbmm": 1,
    "aten._grouped_mm": 0,
    "mkldnn._linear_pointwise": 0,
    "transformers.grouped_mm_fallback": 0,
}
"""Matrix products, each with the place of its first factor among the arguments."""

_ATTENTION = frozenset(
    f"aten._scaled_dot_product_{kind}"
    for kind in (
        "flash_attention_for_cpu",
        "flash_attention",
        "efficient_attention",
        "cudnn_attention",
        "fused_attention_overrideable",
    )
)
"""Fused attention: query `[batch, heads, q, head_dim]`, key, value. The unfused form falls apart into products."""

_COPIES = frozenset(
    f"aten.{kind}" for kind in ("cat", "clone", "copy_", "_to_copy", "roll", "repeat", "index_select", "index")
)
_KNOWN = _PRODUCTS.keys() | _ATTENTION | _COPIES
