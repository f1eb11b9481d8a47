"""States that a model's own modules keep, in no cache (RecurrentGemma): cleared, copied, put back and counted.

Left alone, those of one sequence would go on in the next: a single token is added to whatever state is there.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

_NAMES = "conv1d_state", "recurrent_states"
"""What transformers' modules call them; without any yet, the attribute is None."""


class ModuleStates:
    """The states in the modules of a model; most models have none."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Find where they are kept."""
        self._kept = [(vars(part), name) for part in model.modules() for name in _NAMES if name in vars(part)]

    @property
    def tensors(self) -> list[Tensor]:
        """The states that there are now."""
        return [attributes[name] for attributes, name in self._kept if attributes[name] is not None]

    def clear(self) -> None:
        """Forget them: the next forward begins a sequence."""
        for attributes, name in self._kept:
            attributes[name] = None

    @torch.inference_mode()
    def copied(self) -> list[Tensor | None]:
        """Copy them, for `put_back`."""
        states = (attributes[name] for attributes, name in self._kept)
        return [None if state is None else state.clone() for state in states]

    @torch.inference_mode()
    def put_back(self, states: list[Tensor | None]) -> None:
        """Come back to what `copied` returned, which stays as it is."""
        for (attributes, name), state in zip(self._kept, states, strict=True):
            attributes[name] = None if state is None else state.clone()
