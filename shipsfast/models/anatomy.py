"""Finds out how a transformers model is built by running it once on a few tokens: its decoder layers, which
module of each calls attention, with how many heads, and what each layer's mask hides. No code per family.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel, masking_utils

from ..errors import InputError, UnsupportedModelError
from ..memory import is_out_of_memory
from .attention_hook import TREE, installed
from .decoder_layers import Block, Layer, decoder_layers
from .forward import input_device, rounded_by_batch
from .probing import Probe, ProbeCall, looks_at_end, looks_beyond, probe, probe_rows
from .weights import check_weights

PROBE_TOKENS = 3
# Where a model does something to its logits: its own, a scaled or softcapped version, one in flight.
LOGIT_COPIES = 3
# What a model's own code raises where it is not given what it wants.
MODEL_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)


@dataclass(frozen=True)
class Anatomy:
    """What a scan needs to know of a model.

    layers: the decoder layers that have attention heads, which is what scores count; blocks: all decoder layers;
    looks_beyond: something besides attention carries information from token to token (state space layers,
        convolutions, linear attention) or looks at places in the sequence, and knows of no tree;
    index_limit: the model looks at a token's place in the sequence instead of its position id, and that shows from
        so many tokens on; None if it never does.
    """

    layers: tuple[Layer, ...]
    num_heads: int
    num_kv_heads: int  # the fewest of any layer
    uniform_kv_heads: bool
    head_dim: int
    hidden_size: int
    vocab_size: int
    work_width: int  # numbers per token that a layer holds at a time, roughly: for the memory plan
    value_dim: int
    blocks: tuple[Block, ...]
    looks_beyond: bool
    index_limit: int | None
    longest: int  # tokens of the longest sequence that was announced
    # Arrays of the logits' size that are alive at once: 1 where the head's are final.
    logit_copies: int = LOGIT_COPIES
    autocast: str | None = None  # where torch.autocast was on while attention ran, in words
    looks_at_end: bool = (
        False  # something looks for the last token of a sequence, which is then the only one to read
    )

    @property
    def plain_sequences(self) -> bool:
        """Whether only whole single sequences give the right answer, with every token in every layer."""
        return self.looks_beyond or (self.index_limit is not None and self.longest >= self.index_limit)

    @property
    def trims(self) -> bool:
        """Whether the last layer may run at the prompts' last tokens alone."""
        return not self.plain_sequences and self.blocks[-1].layer is not None

    @property
    def ends_alone(self) -> bool:
        """Whether a token may pass the layers without those before it, given their keys and values."""
        return not self.plain_sequences and all(block.layer is not None for block in self.blocks)

    @property
    def num_layers(self) -> int:
        return len(self.layers)


def check_model(model, token_ids: list[list[int]], new_tokens: int = 0, weights: bool = True) -> None:
    """Raises InputError for an object that is no model, and for prompts that do not fit it with what follows them.

    new_tokens: how many may follow; weights: the model must have them.
    """
    if not isinstance(model, PreTrainedModel):
        raise InputError(
            f"expected a transformers causal language model, got {type(model).__name__}: "
            "load one with AutoModelForCausalLM.from_pretrained"
        )
    layer = rounded_by_batch(model)
    if layer is not None:
        raise UnsupportedModelError(
            f"{layer} of {type(model).__name__} is dynamically quantised ({type(model.get_submodule(layer)).__name__} of "
            "torch.ao.quantization), so a row depends on the rows beside it: quantise it with torchao or bitsandbytes, or run "
            "its own forward passes inside shipsfast.ablate"
        )
    try:
        head, _ = model.get_output_embeddings(), model.get_input_embeddings().weight
    except (NotImplementedError, AttributeError):
        head = None
    if head is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no language-model head: load it with AutoModelForCausalLM"
        )
    if weights:
        check_weights(model)
    if getattr(model.config.get_text_config(), "num_kv_shared_layers", 0):
        raise UnsupportedModelError(
            f"{type(model).__name__} shares keys and values between layers: it cannot be scanned"
        )
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    context = context if context and context > 0 else None
    vocabulary, media = model.get_input_embeddings().weight.shape[0], _media_tokens(model)
    for i, ids in enumerate(token_ids):
        if media and not media.isdisjoint(ids):
            raise InputError(
                f"prompt {i} has token {min(media.intersection(ids))}, in whose place {type(model).__name__} wants an image or "
                "other media, and only text is read: take its placeholder out of the prompt"
            )
        if context is not None and len(ids) > context:
            raise InputError(
                f"prompt {i} has {len(ids)} tokens, and the model's context is {context}: shorten or remove it"
            )
        if context is not None and len(ids) + new_tokens > context:
            raise InputError(
                f"prompt {i} has {len(ids)} tokens, and the model's context is {context}: that leaves no room for "
                f"{new_tokens} new tokens; shorten the prompt or lower max_new_tokens (--max-new-tokens)"
            )
        if not (0 <= min(ids) and max(ids) < vocabulary):
            raise InputError(f"prompt {i} has token ids outside the model's vocabulary of {vocabulary}")


def _media_tokens(model: PreTrainedModel) -> set[int]:
    """Ids of tokens that stand for images, videos or sounds, which are put in their place."""
    named = (
        getattr(model.config, f"{kind}_token_{end}", None)
        for kind in ("image", "video", "audio")
        for end in ("id", "index")
    )
    return {token for token in named if isinstance(token, int)}


def check_own_dtype(model: PreTrainedModel, anatomy: Anatomy) -> None:
    """Raises InputError for a model that switches torch.autocast on by itself."""
    if anatomy.autocast is not None:
        raise InputError(
            f"{type(model).__name__}.forward switches torch.autocast on ({anatomy.autocast}), and what is measured is the model "
            "in its own dtype: take that wrapper off (accelerate: unwrap_model(model, keep_fp32_wrapper=False))"
        )


@torch.inference_mode()
def inspect_model(model: PreTrainedModel, token_ids: Sequence[int], longest: int) -> Anatomy:
    """Run the model once on the first few of `token_ids` and record what calls attention.

    longest: the longest prompt in tokens; masks are checked up to there. A streamed model reads all its layers for it:
    what mixes tokens shows in values only.
    Raises UnsupportedModelError, naming what stands in the way, if the model cannot be scanned exactly.
    """
    family = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"{family} is not a transformers model: load it with AutoModelForCausalLM"
        )
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise UnsupportedModelError(
            f"{family} does not take position_ids, so prompts cannot be packed into one sequence"
        )
    _check_rope(model, longest)
    if any(hasattr(m, "create_position_ids_from_input_ids") for m in model.modules()):
        raise UnsupportedModelError(
            f"{family} counts positions on from its padding token, so position ids that start at 0 mean something else "
            "to it: it cannot be scanned"
        )

    ran: list[tuple[str, torch.nn.Module]] = []
    handles = []
    shapes_in: dict[str, torch.Size] = {}  # of what enters each module
    recorder = Probe(longest)
    device = input_device(model)
    without = device.type == "meta"
    ids, position_ids = (
        torch.tensor(x, device=device)
        for x in probe_rows(
            (list(token_ids) * PROBE_TOKENS)[:PROBE_TOKENS], model.get_input_embeddings().weight.shape[0]
        )
    )
    token = probe.set(recorder)
    try:
        for list_name, container in model.named_modules():
            if isinstance(container, torch.nn.ModuleList):
                for index, child in enumerate(container):
                    name = f"{list_name}.{index}"

                    def note(m, args, kwargs, name=name):
                        ran.append((name, m))
                        shapes_in[name] = getattr(
                            kwargs.get("hidden_states", args[0] if args else None), "shape", None
                        )

                    handles.append(child.register_forward_pre_hook(note, with_kwargs=True))
        given: list[torch.Tensor] = []  # the head's output
        head = model.get_output_embeddings()
        if head is not None:
            handles.append(head.register_forward_hook(lambda _m, _a, out: given.append(out)))
        with installed(model, TREE), _no_values_asked() if without else contextlib.nullcontext():
            logits = model(input_ids=ids, position_ids=position_ids, use_cache=False).logits
    except MODEL_ERRORS as error:
        if isinstance(error, InputError) or is_out_of_memory(error):
            raise
        raise UnsupportedModelError(_why_it_failed(model, ids, error)) from error
    finally:
        probe.reset(token)
        for handle in handles:
            handle.remove()
    if not recorder.calls:
        raise UnsupportedModelError(
            f"{family} has no attention heads that shipsfast can reach: its attention does not go through "
            "transformers' AttentionInterface"
        )
    _check_rows(family, shapes_in, recorder.calls, {module: name for name, module in model.named_modules()})
    layers, blocks = decoder_layers(model, ran, recorder.calls)
    shapes = {(c.num_heads, c.num_kv_heads, c.head_dim) for c in recorder.calls}
    if len({s[0] for s in shapes}) > 1:
        raise UnsupportedModelError(f"{family} has layers with different numbers of heads: {sorted(shapes)}")
    first = recorder.calls[0]
    hidden = model.get_input_embeddings().weight.shape[1]
    return Anatomy(
        layers=layers,
        num_heads=first.num_heads,
        num_kv_heads=min(s[1] for s in shapes),
        uniform_kv_heads=len({s[1] for s in shapes}) == 1,
        head_dim=max(s[2] for s in shapes),
        hidden_size=hidden,
        vocab_size=logits.shape[-1],
        work_width=_work_width(layers[0].module, hidden),
        value_dim=max(c.value_dim for c in recorder.calls),
        blocks=blocks,
        # Without weights there is nothing to see: a layer without attention is taken to look beyond its tokens.
        looks_beyond=any(b.layer is None for b in blocks)
        if without
        else _looks_beyond(model, logits, ids, position_ids),
        index_limit=_index_limit(model),
        longest=longest,
        logit_copies=1 if len(given) == 1 and given[0] is logits else LOGIT_COPIES,
        autocast=next((c.autocast for c in recorder.calls if c.autocast), None),
    )


@torch.inference_mode()
def with_ends(model: PreTrainedModel, anatomy: Anatomy, token_ids: Sequence[int]) -> Anatomy:
    """What `inspect_model` said, for sequences that are read at several tokens: whether something looks for the last one."""
    if not anatomy.looks_beyond or input_device(model).type == "meta":
        return anatomy
    ids = torch.tensor([(list(token_ids) * 2 * PROBE_TOKENS)[: 2 * PROBE_TOKENS]], device=input_device(model))
    places = torch.arange(ids.shape[1], device=ids.device)[None]
    longer = _strangers(model, ids, places)
    short = _strangers(model, ids[:, :PROBE_TOKENS], places[:, :PROBE_TOKENS])
    return replace(anatomy, looks_at_end=looks_at_end(short, longer, _hooked(model)))


def _hooked(model: PreTrainedModel) -> bool:
    """Whether any code but the modules' own runs in a forward pass."""
    return any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
        for module in model.modules()
    )


def _strangers(model: PreTrainedModel, ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """Logits of tokens that attention keeps apart."""
    token = probe.set(Probe(longest=1))
    try:
        with installed(model, TREE):
            return model(input_ids=ids, position_ids=position_ids, use_cache=False).logits
    finally:
        probe.reset(token)


def _looks_beyond(model: PreTrainedModel, logits: torch.Tensor, *given: torch.Tensor) -> bool:
    try:
        return looks_beyond(logits, *given, lambda *tokens: _strangers(model, *tokens))
    except MODEL_ERRORS as error:
        if is_out_of_memory(error):
            raise
        return True  # what does not run on a single token looks at more


@contextlib.contextmanager
def _no_values_asked() -> Iterator[None]:
    """For a model without weights: transformers looks at positions to see whether sequences are packed, which it is
    not told of here, and a tensor on the meta device has no values."""
    before = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda _positions: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = before


def _check_rows(family: str, shapes_in, calls: list[ProbeCall], names) -> None:
    """Between layers a row must be its tokens' hidden states and nothing else."""
    for name, shape in shapes_in.items():
        holds_attention = any(names[c.module].startswith(name + ".") for c in calls)
        if holds_attention and shape is not None and (len(shape) != 3 or shape[:2] != (3, PROBE_TOKENS)):
            raise UnsupportedModelError(
                f"{family} keeps several residual streams (hidden states of shape {list(shape)} enter {name}): it "
                "cannot be scanned"
            )


def _why_it_failed(model: PreTrainedModel, ids: torch.Tensor, error: Exception) -> str:
    """Whose fault it is that the model did not run with shipsfast's attention in place."""
    family, dtype = type(model).__name__, str(model.dtype).removeprefix("torch.")
    try:
        model(input_ids=ids, use_cache=False)
    except MODEL_ERRORS as own:
        return f"{family} does not run on text alone in {dtype} here: {_one_line(own)}"
    return (
        f"{family} uses its attention mask outside transformers' AttentionInterface, or computes attention itself, "
        f"so its heads cannot be reached ({_one_line(error)})"
    )


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _index_limit(model: PreTrainedModel) -> int | None:
    """Llama 4 sharpens attention without rotary embedding by a token's index: log(1 + floor((i + 1) / scale))."""
    limits = [
        int(m.floor_scale)
        for m in model.modules()
        if getattr(m, "attn_temperature_tuning", False)
        and hasattr(m, "floor_scale")
        and not getattr(m, "use_rope", True)
    ]
    return min(limits, default=None)


def _check_rope(model: PreTrainedModel, longest: int) -> None:
    """Rotary embeddings that change with the sequence's length would change when prompts are packed."""
    for config in {
        id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None
    }.values():
        rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        for part in [rope, *(x for x in rope.values() if isinstance(x, dict))]:
            kind = part.get("rope_type", part.get("type"))
            limit = part.get("original_max_position_embeddings") or getattr(
                config, "max_position_embeddings", longest
            )
            if kind in ("dynamic", "longrope") and longest > limit:
                raise UnsupportedModelError(
                    f"{type(model).__name__} changes its rotary embedding ({kind}) for prompts of over {limit} tokens, "
                    f"and the longest has {longest}: scan shorter prompts"
                )


def _work_width(layer: torch.nn.Module, hidden: int) -> int:
    # Quantised linear layers need not be nn.Linear, but say how wide they are.
    wide = sum(x for m in layer.modules() if isinstance(x := getattr(m, "out_features", None), int))
    if not wide:  # Conv1D and other layouts: what a weight matrix has beyond the hidden size is its output
        wide = sum(max(p.shape) for p in layer.parameters() if p.dim() == 2)
    return wide + 8 * hidden
