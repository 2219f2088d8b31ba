"""A faster way through the decoder layers of Llama-like models on a CPU.

The model's own modules stay the oracle (wavefront.py runs them for every other model); what runs here gives
the same numbers up to rounding. A layer of this form

    x += o_proj(attention(rope(q_proj(n)), rope(k_proj(n)), v_proj(n))),   n = rms_norm(x)
    x += down_proj(silu(gate_proj(m)) * up_proj(m)),                       m = rms_norm(x)

is worked on in place: the residual additions are part of the matrix products, and what lies between the
products takes one pass each (csrc/fused_cpu.cpp). Rows that fork in a layer share the base row's queries,
keys and values, and differ from it by one head's output through that head's slice of o_proj:

    x_i = x_base + o_proj(o_base) + W_o[:, heads i] (o_ablated - o_base)[heads i]

so the base row itself comes out of the same step, and passes the MLP with them. Where torch has MKL, the
weights of a layer are packed once for its many chunks of equal size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch.nn.functional import linear
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from .layer_mask import LayerMask
from .metrics import extension_status

LAYERS = (LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer)
PARTS = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
DTYPES = (torch.float32, torch.float64)
CAPTURING = "transformers.utils.output_capturing"
CAN_PACK = torch.backends.mkl.is_available()

# attention(q, k, v, mask, trimmed) -> [B, TQ, H, D]; q, k, v [B, T, heads, D]
Attention = Callable[..., torch.Tensor]


def why_not(layers: list[torch.nn.Module], dtype: torch.dtype, device: torch.device) -> str | None:
    """Why these decoder layers cannot go through this file, None if they can."""
    if device.type != "cpu":
        return "not on a CPU"
    if dtype not in DTYPES:
        return f"dtype {dtype}"
    if not extension_status()[0]:
        return "the native extension is not built"
    for layer in layers:
        if type(layer) not in LAYERS:
            return f"{type(layer).__name__} is not one of {', '.join(c.__name__ for c in LAYERS)}"
        own = type(layer).__module__
        foreign = [name for name in PARTS if type(getattr(layer, name)).__module__ != own]
        if foreign:
            return f"{', '.join(foreign)} is not the model family's own"
        if type(layer.mlp.act_fn).__name__ not in ("SiLUActivation", "SiLU"):
            return f"activation {type(layer.mlp.act_fn).__name__}"
        for name, module in layer.named_modules():
            # The layer's own hooks run: it is called as ever, only its forward is replaced.
            if "forward" in module.__dict__ or module is not layer and _hooks(module):
                return f"{name or 'the layer'} carries hooks or a forward of its own"
            if name.endswith("_proj") and type(module) is not torch.nn.Linear:
                return f"{name} is {type(module).__name__}"
            # Asked without reading it: a quantised weight is a parameter of a class of its own.
            if name.endswith("_proj") and type(module.weight) not in (torch.nn.Parameter, torch.Tensor):
                return f"the weight of {name} is a {type(module.weight).__name__}"
    return None


def loaded_bytes(layer: torch.nn.Module) -> int:
    """What `FusedLayer.loaded` holds at most: weights side by side and, in float32, packed."""
    own = sum(p.numel() * p.element_size() for p in layer.parameters())
    packs = CAN_PACK and next(layer.parameters()).dtype == torch.float32
    return own * (1 + packs)


def _hooks(module: torch.nn.Module) -> list[Callable]:
    """Hooks that want to see or change something.

    transformers leaves some of its own on a model that was ever asked for hidden states or attentions; they do
    nothing in a call that does not ask.
    """
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return [hook for hook in hooks if getattr(hook, "__module__", None) != CAPTURING]


class Product:
    """x @ W^T + b of one or more linear layers side by side, their outputs concatenated.

    Inside `packed(n)`, weights are packed for inputs of n rows the first time that many come in: MKL then
    skips its own packing, which costs 3 to 15 % of a product of cache-sized chunks.
    """

    def __init__(self, *layers: torch.nn.Linear) -> None:
        self.layers = layers
        self.width = sum(layer.out_features for layer in layers)
        self.weight: torch.Tensor | None = None  # [width, in]
        self.bias: torch.Tensor | None = None
        self._packed: torch.Tensor | None = None
        self._size = 0

    def load(self, rows: int) -> None:
        """Get ready for inputs, most of them of `rows` rows; 0 for none worth packing for."""
        weights = [layer.weight for layer in self.layers]
        self.weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        biases = [layer.bias for layer in self.layers]
        if any(b is not None for b in biases):
            zeros = [self.weight.new_zeros(layer.out_features) for layer in self.layers]
            self.bias = torch.cat([z if b is None else b for b, z in zip(biases, zeros, strict=True)])
        if rows and CAN_PACK and self.weight.dtype == torch.float32:
            self._packed = torch.ops.mkl._mkl_reorder_linear_weight(self.weight, rows)
            self._size = rows

    def unload(self) -> None:
        self.weight = self.bias = self._packed = None
        self._size = 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, in] -> [rows, width]"""
        if len(x) == self._size:
            return torch.ops.mkl._mkl_linear(x, self._packed, self.weight, self.bias, self._size)
        return linear(x, self.weight, self.bias)

    def add_to(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """x += self(y), in place."""
        if len(y) == self._size:
            x += self(y)
            return
        x.addmm_(y, self.weight.t())
        if self.bias is not None:
            x += self.bias


class FusedLayer:
    """One decoder layer, applied to rows of residual streams [rows, T, hidden]. Use inside `loaded`."""

    def __init__(self, layer: torch.nn.Module, num_heads: int, num_kv_heads: int) -> None:
        attn, mlp = layer.self_attn, layer.mlp
        self.layer, self.heads, self.kv_heads = layer, num_heads, num_kv_heads
        self.q = Product(attn.q_proj)
        self.kv = Product(attn.k_proj, attn.v_proj)
        self.qkv = Product(attn.q_proj, attn.k_proj, attn.v_proj)
        self.out = Product(attn.o_proj)
        self.gate_up = Product(mlp.gate_proj, mlp.up_proj)
        self.down = Product(mlp.down_proj)

    @contextlib.contextmanager
    def loaded(self, tokens: int, ends: int | None) -> Iterator[None]:
        """Weights made ready for chunks of `tokens` tokens (0: none is met twice).

        ends: prompt ends in a chunk if this is the last layer, None if it is not.
        """
        last = ends is not None
        products = {self.q: ends or 0, self.kv: tokens} if last else {self.qkv: tokens}
        products |= dict.fromkeys((self.out, self.gate_up, self.down), ends if last else tokens)
        try:
            for product, rows in products.items():
                product.load(rows)
            yield
        finally:
            for product in products:
                product.unload()

    def rows(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        attention: Attention,
        mask: LayerMask,
        nodes=None,
    ) -> torch.Tensor:
        """Run rows with their mask. x [B, T, hidden] is overwritten and returned.

        With nodes int64 [U], the layer is the last one: x is only read, and [B, U, hidden] is returned.
        """
        q, k, v = self._qkv(x, cos, sin, nodes)
        out = attention(q, k, v, mask, nodes is not None)
        if nodes is not None:
            x = x.index_select(1, nodes)
        self.out.add_to(_flat(x), _flat(out.flatten(2)))
        self._mlp(x)
        return x

    def forks(
        self,
        base: torch.Tensor,
        heads: list[list[int]],
        mask: LayerMask,
        every: LayerMask,
        cos: torch.Tensor,
        sin: torch.Tensor,
        attention: Attention,
        nodes: torch.Tensor | None,
        chunks: list[slice],
        out: torch.Tensor,
    ) -> torch.Tensor:
        """Write the rows that fork here, one per entry of `heads`, to out [forks, T or U, hidden].

        base: row 0 [1, T, hidden] as it enters the layer, not changed; heads: what each fork has off here beyond
        row 0, the same number for all; mask: row 0's own; every: the mask with every head off (one pass gives
        them all, as heads do not see each other in attention); chunks: slices of the forks that pass the MLP
        together. Returns row 0 as it leaves the layer, [1, T or U, hidden].
        """
        q, k, v = self._qkv(base, cos, sin, nodes)
        last = nodes is not None
        o_base = attention(q, k, v, mask, last)
        o_ablated = attention(q, k, v, every, last)
        delta = (o_ablated - o_base)[0].transpose(0, 1)  # [H, T, D]
        weight = self.out.weight.t().unflatten(0, (self.heads, -1))  # [H, D, hidden]
        start = (base.index_select(1, nodes) if last else base).clone()
        self.out.add_to(_flat(start), _flat(o_base.flatten(2)))
        for number, rows in enumerate(chunks):
            index = torch.tensor(heads[rows])  # [forks, heads of each]
            change = delta[index].transpose(1, 2).flatten(2)  # [forks, T, heads of each * D]
            torch.baddbmm(
                start.expand(len(index), -1, -1), change, weight[index].flatten(1, 2), out=out[rows]
            )
            if number < len(chunks) - 1:
                self._mlp(out[rows])
                continue
            # The base row joins the last of them: alone it would be a small, slow product.
            joined = torch.cat([out[rows], start])
            self._mlp(joined)
            out[rows] = joined[:-1]
        return joined[-1:]

    def _qkv(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, nodes: torch.Tensor | None):
        normed = _norm(x, self.layer.input_layernorm)
        if nodes is None:
            qkv = self.qkv(_flat(normed)).view(*x.shape[:2], -1)
            q, kv = qkv.split([self.q.width, self.kv.width], 2)
            at = (cos, sin)
        else:
            q = self.q(_flat(normed.index_select(1, nodes))).view(len(x), len(nodes), -1)
            kv = self.kv(_flat(normed)).view(*x.shape[:2], -1)
            at = (cos.index_select(0, nodes), sin.index_select(0, nodes))
        q = q.unflatten(2, (self.heads, -1))
        k, v = kv.unflatten(2, (2 * self.kv_heads, -1)).chunk(2, 2)
        return _rope(q, *at), _rope(k, cos, sin), v.contiguous()

    def _mlp(self, x: torch.Tensor) -> None:
        """x += mlp(norm(x)), in place."""
        gate_up = self.gate_up(_flat(_norm(x, self.layer.post_attention_layernorm)))
        inner = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
        torch.ops.shipsfast.silu_mul(gate_up, inner)
        self.down.add_to(_flat(x), inner)


def _rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=x.dtype)
    torch.ops.shipsfast.rope(x, cos, sin, out)
    return out


def _flat(x: torch.Tensor) -> torch.Tensor:
    """[B, T, n] as [B T, n]"""
    return x.reshape(-1, x.shape[-1]) if not x.is_contiguous() else x.view(-1, x.shape[-1])


def _norm(x: torch.Tensor, norm: torch.nn.Module) -> torch.Tensor:
    if x.dtype == torch.float64:
        return norm(x)  # it rounds to float32 on the way, in its own order: only itself repeats that exactly
    out = torch.empty_like(x)
    torch.ops.shipsfast.rms_norm(x, norm.weight, norm.variance_epsilon, out)
    return out
