"""How far each head of the unablated model rests on the first token, and how much it writes.

A head that has nothing to say looks at the first token of the prompt (an attention sink; Xiao et al., arXiv 2309.17453), and then
gives the same everywhere. Its weight there is what attention makes of other values in the place of its own, which are 1 at
the first token and 0 elsewhere: so it comes from the attention that runs, with its window, softcap and learned sinks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from ..models.anatomy import Anatomy
from ..models.forward import rounded_to
from ..ops.prefix_tree import PackedPrompts, pack
from .replacement_values import few_at_a_time, through, tree_outputs

# By how much, of its own size, what a projection makes of all heads may differ from the sum of what it makes of each.
NOT_LINEAR = {torch.float64: 1e-6, torch.float32: 1e-3}
ROUNDED = 0.05  # the same where it rounds to half precision

NUMBERS = (
    "first_token", "first_token_at_end", "learned_sink", "output_norm", "output_spread", "residual_norm",
)  # fmt: skip


@torch.inference_mode()
def sink_numbers(
    model: PreTrainedModel, anatomy: Anatomy, token_ids: Sequence[Sequence[int]], backend: str
) -> dict[str, np.ndarray]:
    """By the names in NUMBERS, float64 [L, H], which results/sink_mass.py describes.

    token_ids: prompts of two tokens or more. Positions after the first count: their mean over a prompt, and its mean over
    prompts.
    """
    found = {name: np.zeros((anatomy.num_layers, anatomy.num_heads)) for name in NUMBERS}
    outputs: list[torch.Tensor | int] = [0] * anatomy.num_layers  # sums [H, D]
    for group in few_at_a_time(anatomy, token_ids):
        packed = pack(group)
        each = np.array([1 / (len(ids) - 1) for ids in group])
        weight = through(packed, each) * (packed.position > 0)
        pass_ = _Pass(anatomy, packed, weight, found, outputs, NOT_LINEAR.get(rounded_to(model), ROUNDED))
        with pass_.projections():
            tree_outputs(model, anatomy, packed, backend, pass_.outputs, pass_.weights)
    found = {name: numbers / len(token_ids) for name, numbers in found.items()}
    of_mean = [(total / len(token_ids)).square().sum(-1).cpu().numpy() for total in outputs]
    # The variance; of a head that gives one vector everywhere, rounding decides its sign.
    found["output_spread"] = np.sqrt(np.maximum(found["output_spread"] - np.stack(of_mean), 0))
    return found


class _Pass:
    """One pack of prompts. weight: what each node counts, float64 [T]; found, outputs: to what its numbers and the
    heads' outputs are added; rounding: of the model's products, relative."""

    def __init__(
        self,
        anatomy: Anatomy,
        packed: PackedPrompts,
        weight: np.ndarray,
        found: dict[str, np.ndarray],
        outputs: list,
        rounding: float,
    ) -> None:
        self.anatomy, self.found, self._outputs, self._rounding = anatomy, found, outputs, rounding
        self._weight, self._ends = torch.as_tensor(weight), torch.as_tensor(packed.last_index)
        self._first = torch.as_tensor(packed.position == 0)
        self._out: dict[int, torch.Tensor] = {}  # of layers whose output projection has not been met

    def _add(self, name: str, layer: int, by_node: torch.Tensor) -> None:
        """by_node: [T, H]."""
        weight = self._weight.to(by_node.device)
        self.found[name][layer] += torch.einsum("t,th->h", weight, by_node.double()).cpu().numpy()

    def weights(self, layer: int, values: torch.Tensor, attend: Callable, sinks) -> None:
        other = torch.zeros_like(values)
        other[:, :, self._first.to(values.device), 0] = 1
        other[..., 1] = 1  # all that a query sees
        first, seen = attend(other)[0, ..., :2].unbind(-1)  # [T, H]
        self._add("first_token", layer, first)
        if sinks is not None:
            self._add("learned_sink", layer, 1 - seen.double())
        ends = first[self._ends.to(first.device)].double().sum(0)
        self.found["first_token_at_end"][layer] += ends.cpu().numpy()

    def outputs(self, layer: int, out: torch.Tensor) -> None:
        wide = out[0].double()
        self._add("output_norm", layer, wide.norm(dim=-1))
        self._add("output_spread", layer, wide.square().sum(-1))
        self._outputs[layer] += torch.einsum("t,thd->hd", self._weight.to(out.device), wide)
        self._out[layer] = out

    @contextlib.contextmanager
    def projections(self) -> Iterator[None]:
        """Inside, the module that takes the heads' outputs of a layer side by side is met; else its numbers are NaN."""
        with contextlib.ExitStack() as undo:
            for index, layer in enumerate(self.anatomy.layers):
                for module in layer.module.modules():

                    def met(module, args, index=index):
                        self._met(index, module, args)

                    undo.callback(module.register_forward_pre_hook(met).remove)
            yield
            for layer in self._out:
                self.found["residual_norm"][layer] = np.nan

    def _met(self, layer: int, module: torch.nn.Module, args: tuple) -> None:
        out = self._out.get(layer)  # [1, T, H, D]
        if out is None or not args or not isinstance(args[0], torch.Tensor):
            return
        given = args[0]
        if given.shape[-1] != out[0, 0].numel() or not torch.equal(given.flatten(), out.flatten()):
            return
        if next(module.parameters(), None) is None:  # dropout and the like: what follows takes the same
            return
        del self._out[layer]
        nothing = module.forward(torch.zeros_like(given))  # its bias
        if not isinstance(nothing, torch.Tensor):
            self._out[layer] = out
            return
        norms, total = [], nothing.double()
        for head in range(out.shape[2]):
            alone = torch.zeros_like(out)
            alone[:, :, head] = out[:, :, head]
            wrote = module.forward(alone.view_as(given)).double() - nothing.double()
            norms.append(wrote.flatten(0, -2).norm(dim=-1))
            total = total + wrote
        whole = module.forward(given).double()
        off = float((total - whole).norm()) / (float(whole.norm()) or 1.0)
        if off <= self._rounding:
            self._add("residual_norm", layer, torch.stack(norms, -1))
        else:  # a norm before the projection, say: what one head writes is not defined
            self._out[layer] = out
