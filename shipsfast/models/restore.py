"""The model, the run folders and torch's settings are left in order by a call, whatever ends it and wherever.

Every part of a scan puts back what it changes. That is enough for errors, not for Ctrl-C: the exception can rise between
any two lines, those that put things back among them. So the outermost call notes the model's state first, lets one
signal through at most, and after an exception holds the model against its notes.
"""

from __future__ import annotations

import contextlib
import functools
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Self

import torch

from ..errors import InputError
from ..runs.folder import closing
from .ambient import refuse_surroundings, set_aside
from .attention_hook import ATTRIBUTE, _configs
from .probing import probe

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM") if hasattr(signal, name))
PACKAGE = "shipsfast."
_GONE = object()
_at_work: dict[int, int] = {}  # id of a model that a call changes for now -> its thread
_taking = threading.Lock()


def untouched(function: Callable) -> Callable:
    """Decorates a function whose first argument, `model`, is the model: the one way into every call that runs a model.

    What is set around the call changes nothing in it (ambient.py). Raises InputError inside of torch.autocast or a transform of torch.func.
    """

    @functools.wraps(function)
    def call(*args, **kwargs):
        refuse_surroundings()
        model = args[0] if args else kwargs.get("model")
        with _OneSignal() as signals, _alone(model), set_aside():
            before = _state(model) if isinstance(model, torch.nn.Module) else None
            try:
                with closing():
                    return function(*args, **kwargs)
            except BaseException:
                signals.closed = True
                if before is not None:
                    _put_back(before)
                raise
            finally:
                signals.closed = True

    return call


@contextlib.contextmanager
def _alone(model) -> Iterator[None]:
    """Raises InputError while another thread is at work on the model: each would note the other's changes as its state."""
    mine = threading.get_ident()
    with _taking:
        owner = _at_work.get(id(model))
        if owner is None:
            _at_work[id(model)] = mine
    if owner not in (None, mine):
        raise InputError(
            "another thread is at work on this model, and changes it for so long: wait for it, or give each thread a copy"
        )
    try:
        yield
    finally:
        if owner is None:
            _at_work.pop(id(model), None)


class _OneSignal:
    """Lets the first signal interrupt what runs inside. A second one waits until everything is put back."""

    def __init__(self) -> None:
        self.closed, self._passed, self._waiting, self._before = False, False, [], {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                handler = signal.getsignal(number)
                if callable(handler):
                    self._before[number] = handler
                    signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame) -> None:
        if self.closed:
            self._waiting.append((number, frame))
            return
        self.closed = self._passed = True
        self._before[number](number, frame)

    def __exit__(self, *exc) -> None:
        self.closed = True
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._waiting and not self._passed:
            number, frame = self._waiting[0]
            self._before[number](number, frame)


def _state(model: torch.nn.Module) -> tuple:
    """What a scan changes while it runs, as it is now."""
    modules = [
        (
            module,
            module.training,
            module.__dict__.get("forward", _GONE),
            module.__dict__.get(ATTRIBUTE, _GONE),
            [set(hooks) for hooks in _hooks(module)],
        )
        for module in model.modules()
    ]
    configs = [(config, config._attn_implementation_internal) for config in _configs(model)]
    return modules, configs, probe.get()


def _hooks(module: torch.nn.Module) -> tuple[dict, dict]:
    return module._forward_pre_hooks, module._forward_hooks


def _is_ours(hook: Callable) -> bool:
    """Not one that the caller has added meanwhile, in a metric perhaps."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    return str(getattr(hook, "__module__", "")).startswith(PACKAGE)


def _put_back(before: tuple) -> None:
    modules, configs, probed = before
    for config, how in configs:
        config._attn_implementation_internal = how
    for module, training, forward, attribute, hooks in modules:
        module.training = training
        for name, value in (("forward", forward), (ATTRIBUTE, attribute)):
            if value is not _GONE:
                module.__dict__[name] = value
            else:
                module.__dict__.pop(name, None)
        for now, then in zip(_hooks(module), hooks, strict=True):
            for key in [key for key, hook in now.items() if key not in then and _is_ours(hook)]:
                now.pop(key, None)
                for notes in (module._forward_hooks_with_kwargs, module._forward_hooks_always_called,
                              module._forward_pre_hooks_with_kwargs):  # fmt: skip
                    notes.pop(key, None)
    probe.set(probed)
