"""Weights that are in memory only while their decoder layer runs.

Two kinds of model keep weights elsewhere: those that accelerate has offloaded (its hooks know where), and those that
streaming.py reads from their checkpoint layer by layer. Since all rows of a block pass a layer together, a layer's
weights are brought in once per pass over the layers, before its forward, and dropped after it, also after an exception;
meanwhile one thread brings in those of the next layer. So at most two layers' weights are held at any time.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch

from ..errors import InputError, UnsupportedModelError

STREAM = "_shipsfast_stream"  # attribute of a model whose layers come from its checkpoint: its LayerWeights
KNOWN_HOOKS = ("AlignDevicesHook", "SequentialHook")


class LayerWeights:
    """Brings in the weights of `layers` when they run, one after the other, and drops them.

    Args:
        layers: modules in the order in which they run.
        bring, drop: put the weights of layers[i] in their place, in any thread, and take them out again. What `bring`
            left half done when it failed, `drop` takes out.
        read: the value of the parameter or buffer with this full name, without a place in the model.
    """

    def __init__(
        self,
        layers: Sequence[torch.nn.Module],
        bring: Callable[[int], None],
        drop: Callable[[int], None],
        read: Callable[[str], torch.Tensor] | None = None,
    ) -> None:
        self.layers = list(layers)
        self.read = read
        self._bring, self._drop = bring, drop
        self._held: set[int] = set()
        self._ahead: tuple[int, Future] | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._idle = False

    def install(self, model: torch.nn.Module) -> list:
        """Hook into the layers, and into the model for what an exception leaves; returns the handles."""
        # Methods and partials of them, not lambdas: a deep copy of the model has hooks of its own. What torch hands
        # to a hook they take as *_.
        handles = [model.register_forward_hook(self.close, always_call=True)]
        for index, layer in enumerate(self.layers):
            enter = layer.register_forward_pre_hook(partial(self._enter, index))
            leave = layer.register_forward_hook(partial(self._leave, index), always_call=True)
            handles += [enter, leave]
        return handles

    @contextlib.contextmanager
    def idle(self) -> Iterator[None]:
        """For passes in which the layers compute nothing."""
        before, self._idle = self._idle, True
        try:
            yield
        finally:
            self._idle = before

    def close(self, *_) -> None:
        """Drop what is held, and end the thread: no forked process has it, and no copy of the model can."""
        if self._idle:
            return
        self._settle()
        for index in list(self._held):
            self._leave(index)
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _enter(self, index: int, *_) -> None:
        if self._idle:
            return
        self._settle(index)
        for other in self._held - {index}:  # of a pass that was interrupted
            self._leave(other)
        if index not in self._held:
            self._held.add(index)
            self._bring(index)
        if index + 1 < len(self.layers):
            self._pool = self._pool or ThreadPoolExecutor(1, "shipsfast-weights")
            self._ahead = index + 1, self._pool.submit(self._bring, index + 1)

    def _settle(self, wanted: int | None = None) -> None:
        """Wait for the layer that is on its way; drop it if it is not the one wanted."""
        if self._ahead is None:
            return
        (index, future), self._ahead = self._ahead, None
        self._held.add(index)
        try:
            future.result()
        except BaseException:
            self._leave(index)
            if wanted is not None:
                raise
        if index != wanted and index in self._held:
            self._leave(index)

    def _leave(self, index: int, *_) -> None:
        if self._idle or index not in self._held:
            return
        self._held.discard(index)
        self._drop(index)


@contextlib.contextmanager
def on_demand(model: torch.nn.Module, layers: Sequence[torch.nn.Module]) -> Iterator[LayerWeights]:
    """The model's layers bring in their weights once per pass; what lies outside them is in memory."""
    stream = model.__dict__.get(STREAM)
    if stream is not None:
        try:
            yield stream
        finally:
            stream.close()
        return
    offloaded = any(offloading(m) for layer in layers for m in layer.modules())
    taken: dict[int, list] = {}

    def bring(index: int) -> None:
        taken[index] = []
        _take(layers[index].modules(), taken[index])

    weights = LayerWeights(layers, bring, lambda index: _give_back(taken.pop(index, [])))
    with brought_in(_outside(model, layers)), contextlib.ExitStack() as undo:
        if offloaded:  # layers that are in memory do without hooks
            undo.callback(weights.close)
            for handle in weights.install(model):
                undo.callback(handle.remove)
        yield weights


@contextlib.contextmanager
def brought_in(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """The weights that accelerate has offloaded from these modules are in their places."""
    taken: list = []
    try:
        _take(modules, taken)
        yield
    finally:
        _give_back(taken)


def _take(modules: Iterable[torch.nn.Module], taken: list) -> None:
    """Let accelerate's own hooks bring weights in, and have them leave those alone in the calls to come."""
    for module in modules:
        for hook in offloading(module):
            taken.append((hook, module))
            hook.pre_forward(module)
            hook.offload = False


def _give_back(taken: list) -> None:
    for hook, module in reversed(taken):
        hook.offload = True
        hook.post_forward(module, None)


def _outside(model: torch.nn.Module, layers: Sequence[torch.nn.Module]) -> Iterator[torch.nn.Module]:
    inside = {id(m) for layer in layers for m in layer.modules()}
    return (m for m in model.modules() if id(m) not in inside)


def _hooks(module: torch.nn.Module) -> list:
    """accelerate's hooks of one module."""
    hook = module.__dict__.get("_hf_hook")
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def offloading(module: torch.nn.Module) -> list:
    """Those of its hooks that bring in weights for each call, and drop them."""
    return [hook for hook in _hooks(module) if getattr(hook, "offload", False)]


def where_weights_are(model: torch.nn.Module) -> str:
    """ "memory", "offloaded" (by accelerate, to a CPU or disk), "dispatched" (over devices) or "streamed"."""
    if STREAM in model.__dict__:
        return "streamed"
    if any(offloading(m) for m in model.modules()):
        return "offloaded"
    devices = {p.device for p in model.parameters()}
    return "dispatched" if len(devices) > 1 or any(_hooks(m) for m in model.modules()) else "memory"


def check_in_memory(model: torch.nn.Module) -> None:
    """Raises UnsupportedModelError where every token would bring in all weights anew, or several devices take turns."""
    where = where_weights_are(model)
    if where != "memory":
        raise UnsupportedModelError(
            f"the weights of {type(model).__name__} are {where}, and every token of a text would wait for all of them: "
            "load it onto one device to generate, or use model.generate inside shipsfast.ablate"
        )


def absent_bytes(layers: Sequence[torch.nn.Module]) -> int:
    """Of these layers' weights that are not in memory: a pass through all of them reads so many."""
    return sum(_absent_bytes(module) for layer in layers for module in layer.modules())


def coming_bytes(model: torch.nn.Module, layers: Sequence[torch.nn.Module]) -> int:
    """Weights that a scan will bring into memory: two layers, and all that is outside them."""
    absent = [sum(_absent_bytes(m) for m in layer.modules()) for layer in layers]
    return 2 * max(absent, default=0) + sum(map(_absent_bytes, _outside(model, layers)))


def _absent_bytes(module: torch.nn.Module) -> int:
    own = [*module._parameters.values(), *module._buffers.values()]
    return sum(t.numel() * t.element_size() for t in own if t is not None and t.is_meta)


def check_weights(model: torch.nn.Module) -> None:
    """Raises UnsupportedModelError for weights that are nowhere, and for hooks of accelerate other than its usual ones."""
    family = type(model).__name__
    for module in model.modules():
        for hook in (module.__dict__.get("_hf_hook"), *_hooks(module)):
            if hook is not None and type(hook).__name__ not in KNOWN_HOOKS:
                raise UnsupportedModelError(
                    f"{family} carries accelerate's {type(hook).__name__}, which shipsfast does not know: load it "
                    "with device_map, or without"
                )
    lost = [name for name, p in model.named_parameters() if p.is_meta and _reader(model, name) is None]
    if lost:
        raise UnsupportedModelError(
            f"{family} has no weights for {lost[0]} (they are on the meta device): load them first"
        )
    without = {p.device for p in model.parameters() if not p.is_meta}
    if len(without) > 1 and not any(_hooks(m) for m in model.modules()):
        raise UnsupportedModelError(
            f"{family} lies on {', '.join(sorted(map(str, without)))} and nothing moves data between them: load it "
            "with device_map, or onto one device"
        )


def _reader(model: torch.nn.Module, name: str) -> Callable[[], torch.Tensor] | None:
    """What gives the value of this meta tensor, None if nobody knows it."""
    stream = model.__dict__.get(STREAM)
    if stream is not None:
        return partial(stream.read, name) if name.startswith(tuple(stream.prefixes)) else None
    parts = name.split(".")
    for cut in range(len(parts) - 1, -1, -1):
        for hook in offloading(model.get_submodule(".".join(parts[:cut]))):
            if hook.weights_map is not None and (cut == len(parts) - 1 or hook.place_submodules):
                return partial(hook.weights_map.__getitem__, ".".join(parts[cut:]))
    return None


def value_of(model: torch.nn.Module, name: str) -> torch.Tensor:
    """The value of a parameter or buffer that is not in memory. Raises InputError if nobody knows it."""
    read = _reader(model, name)
    if read is None:
        raise InputError(f"{type(model).__name__} has no weights for {name}: load them first")
    return read()


def execution_device(model: torch.nn.Module, module: torch.nn.Module) -> torch.device:
    """Where a module computes."""
    for inner in module.modules():  # itself first
        for hook in _hooks(inner):
            device = getattr(hook, "execution_device", None)
            if device is not None:
                return torch.device(device)
    tensors = itertools.chain(module.parameters(), module.buffers(), model.parameters())
    return next((t.device for t in tensors if not t.is_meta), torch.device("meta"))
