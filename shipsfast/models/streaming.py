"""Models larger than the memory: embeddings, final norm and head are loaded, decoder layers read when they run.

transformers loads the model, and its own loader reads every layer the first time: it is given the tensors outside the
layers first, and each layer's own when that layer is due. So names, merged experts, dtypes and buffers come out as they do
when all is loaded. What it makes of a layer is held against the files, and a layer that is their bytes as they are comes
straight from them from then on, some seven times as fast (layer_bytes.py). Tensors are read, not mapped: what is held is the
model's memory, not the page cache. Nothing is written.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import logging

from ..errors import InputError, UnsupportedModelError
from .layer_bytes import Buffers, Place, found_at, needed, places, read_alone
from .weights import STREAM, LayerWeights

_one_at_a_time = threading.Lock()  # transformers' loader is replaced while a model is built


class CheckpointLayers(LayerWeights):
    """The layers of a streamed model. prefixes: of the names of their weights, such as "model.layers.3."."""

    def __init__(self, model: PreTrainedModel, load: Callable, names: list[str], sources: list[dict]) -> None:
        """load(model, tensors): transformers' loader; names: of the layers; sources: the checkpoint's tensors of each."""
        super().__init__([model.get_submodule(n) for n in names], self._read_in, self._take_out, self._value)
        self.model, self.names, self.sources = model, names, sources
        self.prefixes = [f"{name}." for name in names]
        self.targets = [{source.target: source for source in layer.values()} for layer in sources]
        self.device = torch.device("cpu")
        self._load = load
        self._converted = False  # does the loader do more than rename
        self._side: torch.cuda.Stream | None = None
        self._empty = [
            [
                (module, kind, name, tensor)
                for module in layer.modules()
                for kind in ("_parameters", "_buffers")
                for name, tensor in getattr(module, kind).items()
                if tensor is not None and tensor.is_meta
            ]
            for layer in self.layers
        ]
        # Of every layer: None until it has been read once, empty if it is not the bytes of files as they are.
        self._places: list[list[list[Place]] | None] = [None] * len(self.layers)
        self._buffers: Buffers | None = None

    def layer_bytes(self) -> int:
        """Of the largest layer, in a buffer."""
        return max(needed(t for *_, t in tensors) for tensors in self._empty)

    def close(self, *_) -> None:
        super().close()
        if not self._idle:
            self._buffers = None

    def _read_in(self, index: int) -> None:
        with torch.inference_mode(False):
            if self._places[index]:
                self._read_bytes(index, self._places[index])
            else:
                self._read_by_loader(index)

    def _read_by_loader(self, index: int) -> None:
        if self._buffers is not None:  # the loader takes memory of its own
            self._buffers.clear()
        with no_progress_bar():
            info = self._load(self.model, self.sources[index])
        self._check(index, info)
        if self._places[index] is None:
            self._places[index] = self._find(index)
        if self.device.type == "cuda":
            self._to_device(index)

    def _read_bytes(self, index: int, where: list[list[Place]]) -> None:
        on_gpu = self.device.type == "cuda"
        if self._buffers is None:
            self._buffers = Buffers(self.layer_bytes(), pinned=on_gpu)
        wanted = [(pieces, meta) for pieces, (*_, meta) in zip(where, self._empty[index], strict=True)]
        tensors = self._buffers.read(index, wanted)
        for (module, kind, name, meta), tensor in zip(self._empty[index], tensors, strict=True):
            getattr(module, kind)[name] = _like(meta, tensor)
        if on_gpu:
            self._to_device(index)
            del tensor, tensors
            self._buffers.give_back(index)

    def _find(self, index: int) -> list[list[Place]]:
        """Where the tensors of the layer that has just been loaded lie in the files, empty unless all do, byte for byte."""
        names = {id(m): name for name, m in self.layers[index].named_modules(prefix=self.names[index])}
        sources = [source.place for source in self.sources[index].values()]
        found = []
        for module, kind, name, meta in self._empty[index]:
            named = self.targets[index].get(f"{names[id(module)]}.{name}")
            tensor = getattr(module, kind)[name]
            same_form = (type(tensor), tensor.dtype, tensor.shape) == (type(meta), meta.dtype, meta.shape)
            pieces = found_at(tensor, named.place if named else None, sources) if same_form else []
            if not pieces:
                return []
            found.append(pieces)
        return found

    def _check(self, index: int, info) -> None:
        """Raises InputError unless every weight of the layer has been read. info: what the loader says."""
        where = self.model.config._name_or_path
        if info.mismatched_keys:
            name, got, expected = next(iter(info.mismatched_keys))
            raise InputError(
                f"{where}: {name} has the shape {tuple(got)}, and the config says {tuple(expected)}"
            )
        if info.conversion_errors or info.error_msgs:
            first = str([*info.conversion_errors, *info.error_msgs][0])
            raise InputError(f"{where}: {self.names[index]} cannot be read: {first}")
        tensors = [getattr(module, kind)[name] for module, kind, name, _ in self._empty[index]]
        if any(t.is_meta for t in tensors):
            lost = sorted(k for k in info.missing_keys if k.startswith(self.prefixes[index]))
            raise InputError(f"{where} lacks weights of the model, such as {lost[0]}: they would be random")
        for tensor in tensors:
            tensor.requires_grad_(False)

    def _to_device(self, index: int) -> None:
        """Copy a layer to the GPU beside the work that runs there; it is there when this returns."""
        self._side = self._side or torch.cuda.Stream(self.device)
        with torch.cuda.stream(self._side), torch.inference_mode(False):
            for module, kind, name, _ in self._empty[index]:
                tensor = getattr(module, kind)[name]
                pinned = tensor.detach() if tensor.is_pinned() else tensor.detach().pin_memory()
                copy = pinned.to(self.device, non_blocking=True)
                getattr(module, kind)[name] = _like(tensor, copy)
        self._side.synchronize()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_side": None, "_buffers": None}  # a copy has its own

    def _take_out(self, index: int) -> None:
        if self.device.type == "cuda":
            # Kernels that use the weights may still be queued, and their memory is the next layer's.
            torch.cuda.current_stream(self.device).synchronize()
        for module, kind, name, meta in self._empty[index]:
            getattr(module, kind)[name] = meta
        if self._buffers is not None:
            self._buffers.give_back(index)

    def _value(self, name: str) -> torch.Tensor:
        """One tensor as the loader would make it: read alone if it is only renamed, else with its layer."""
        index = next(i for i, prefix in enumerate(self.prefixes) if name.startswith(prefix))
        source = self.sources[index].get(name)
        if source is not None and not self._converted:
            meta = self.model.get_parameter_or_buffer(name)
            return source.mapped().to(meta.dtype)
        if index not in self._held:
            self.close()
            self._held.add(index)
            self._bring(index)
        return self.model.get_parameter_or_buffer(name)


class Source:
    """A tensor of a checkpoint file, read when it is indexed: what transformers' loader takes for a tensor.

    target: the weight's name in the model, if the loader does no more than rename it; place: where its bytes are.
    """

    def __init__(self, name: str, target: str, place: Place, opened) -> None:
        self.name, self.target, self.place, self.slice = name, target, place, opened.get_slice(name)
        self.get_shape, self.get_dtype = self.slice.get_shape, self.slice.get_dtype

    def __getitem__(self, index) -> torch.Tensor:
        shape = self.get_shape()
        if index is ... and shape:
            return read_alone(self.place, self.slice[:0].dtype, shape)
        return self.slice[index]

    def __deepcopy__(self, _memo) -> Source:
        return self  # it is never changed, and neither is the file

    def mapped(self) -> torch.Tensor:
        """The tensor, of which only what is looked at is read."""
        try:
            with safe_open(self.place.file, framework="pt") as file:
                return file.get_tensor(self.name)
        except OSError as error:
            raise InputError(
                f"{self.place.file} cannot be read any more: a streamed model needs its files"
            ) from error


def load_streamed(name: str, device: torch.device, loader: type, **how) -> tuple[PreTrainedModel, dict]:
    """A causal language model whose decoder layers are read from its safetensors when they run; and loading info.

    loader: the class of transformers that loads it; how: what from_pretrained takes, which is to use safetensors and to give loading info.
    Raises UnsupportedModelError for checkpoints whose layers cannot be read one by one, and what from_pretrained does.
    """
    made: list[CheckpointLayers] = []

    def load(original, model, state_dict, checkpoint_files, load_config, expected_keys=None):
        _check(model, checkpoint_files, load_config)
        outside, names, sources = _sort(model, checkpoint_files, load_config)

        def load_part(model, tensors: dict):
            info, _ = original(model, tensors, None, load_config)
            return info

        layers = CheckpointLayers(model, load_part, names, sources)
        layers._converted = any(isinstance(w, WeightConverter) for w in load_config.weight_mapping or [])
        made.append(layers)
        info, offload = original(model, outside, None, load_config, expected_keys)
        info.missing_keys = {k for k in info.missing_keys if not k.startswith(tuple(layers.prefixes))}
        return info, offload

    with _one_at_a_time, _loading_with(load):
        model, info = loader.from_pretrained(name, **how)
    layers = made[-1]
    layers.device = device
    model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))
    model.__dict__[STREAM] = layers
    layers.install(model)
    return model, info


def _check(model: PreTrainedModel, checkpoint_files, load_config) -> None:
    family = type(model).__name__
    if load_config.hf_quantizer is not None:
        kind = load_config.hf_quantizer.quantization_config.quant_method
        raise UnsupportedModelError(
            f"this checkpoint is quantised ({getattr(kind, 'value', kind)}), and its layers cannot be read one by one: "
            "load it without --stream, or stream the unquantised checkpoint"
        )
    if not checkpoint_files or not all(str(f).endswith(".safetensors") for f in checkpoint_files):
        raise UnsupportedModelError(
            f"{family} has no safetensors to stream from: convert the checkpoint first"
        )


def _sort(model: PreTrainedModel, files: list[str], load_config) -> tuple[dict, list[str], list[dict]]:
    """The checkpoint's tensors: those outside the layers by name, the layers' names, and those of each layer by name."""
    names = _layer_names(model)
    shared = [
        key for pair in model.all_tied_weights_keys.items() for key in pair if _index(key, names) is not None
    ]
    if not names or shared:
        problem = (
            f"ties {shared[0]} to another weight" if shared else "keeps no decoder layers in a ModuleList"
        )
        raise UnsupportedModelError(
            f"{type(model).__name__} {problem}: its layers cannot be read one by one; load it without --stream"
        )
    mapping = load_config.weight_mapping or []
    renamings = [w for w in mapping if isinstance(w, WeightRenaming)]
    converters = [w for w in mapping if isinstance(w, WeightConverter)]
    known = model.state_dict()
    outside: dict[str, Source] = {}
    sources: list[dict[str, Source]] = [{} for _ in names]
    for file in files:
        opened = safe_open(file, framework="pt", backend="pread")
        where = places(file)
        for key in opened.keys():  # noqa: SIM118 (it is no dict)
            target, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
            if target not in known and key in known:
                target = key
            index = _index(target, names)
            (outside if index is None else sources[index])[key] = Source(key, target, where[key], opened)
    return outside, names, sources


def _layer_names(model: PreTrainedModel) -> list[str]:
    """Members of the outermost ModuleLists: decoder layers, and what other towers have."""
    lists = [name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    outermost = [name for name in lists if not any(name.startswith(other + ".") for other in lists)]
    return [f"{name}.{i}" for name in outermost for i in range(len(model.get_submodule(name)))]


def _index(key: str, names: list[str]) -> int | None:
    """Which of the layers `names` a weight belongs to."""
    parts = key.split(".")
    places = {name: i for i, name in enumerate(names)}
    return next((places[n] for k in range(len(parts)) if (n := ".".join(parts[:k])) in places), None)


def _like(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    return torch.nn.Parameter(new, requires_grad=False) if isinstance(old, torch.nn.Parameter) else new


@contextlib.contextmanager
def _loading_with(load: Callable) -> Iterator[None]:
    """transformers loads the models of this thread, and of no other, with `load`, which is given its own loader first."""
    name, ours = "_load_pretrained_model", threading.get_ident()
    before, original = PreTrainedModel.__dict__[name], getattr(PreTrainedModel, name)

    def loader(*args, **kwargs):
        if threading.get_ident() != ours:
            return original(*args, **kwargs)
        return load(original, *args, **kwargs)

    setattr(PreTrainedModel, name, staticmethod(loader))
    try:
        yield
    finally:
        setattr(PreTrainedModel, name, before)


@contextlib.contextmanager
def no_progress_bar() -> Iterator[None]:
    """transformers' loader shows a bar each time it is called."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
