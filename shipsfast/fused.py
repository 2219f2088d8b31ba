"""A faster way through the decoder layers of Llama-like models on a CPU.

The model's own modules stay the oracle (wavefront.py runs them for every other model); what runs here gives
the same numbers up to rounding. A layer of this form

    x += o_proj(attention(rope(q_proj(n)), rope(k_proj(n)), v_proj(n))),   n = rms_norm(x)
    x += down_proj(silu(gate_proj(m)) * up_proj(m)),                       m = rms_norm(x)

is worked on in place: the residual additions are part of the matrix products, and what lies between the
products takes one pass each (csrc/fused_cpu.cpp). Rows that fork in a layer share the base row's queries,
keys and values, and differ from it by one head's output through that head's slice of o_proj:

    x_i = x_base + o_proj(o_base) + W_o[:, head i] (o_ablated - o_base)[head i]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import linear
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from .metrics import extension_status

LAYERS = (LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer)
PARTS = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
DTYPES = (torch.float32, torch.float64)

# attention(q, k, v, logit_scale, output_scale, trimmed) -> [B, TQ, H, D]; q, k, v [B, T, heads, D]
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
            if (
                "forward" in module.__dict__
                or module is not layer
                and (module._forward_hooks or module._forward_pre_hooks)
            ):
                return f"{name or 'the layer'} carries hooks or a forward of its own"
            if name.endswith("_proj") and type(module) is not torch.nn.Linear:
                return f"{name} is {type(module).__name__}"
    return None


class FusedLayer:
    """One decoder layer, applied in place to rows of residual streams [rows, T, hidden]."""

    def __init__(self, layer: torch.nn.Module, num_heads: int, num_kv_heads: int) -> None:
        self.layer, self.heads, self.kv_heads = layer, num_heads, num_kv_heads
        self.out_weight = layer.self_attn.o_proj.weight.t()

    def rows(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attention: Attention, vectors, nodes=None
    ) -> torch.Tensor:
        """Run rows with their mask vectors. x [B, T, hidden] is overwritten and returned.

        With nodes int64 [U], the layer is the last one: x is only read, and [B, U, hidden] is returned.
        """
        q, k, v = self._qkv(x, cos, sin, nodes)
        out = attention(q, k, v, *vectors, nodes is not None)
        if nodes is not None:
            x = x.index_select(1, nodes)
        self._add_product(x, out.flatten(2), self.layer.self_attn.o_proj)
        self._mlp(x)
        return x

    def forks(
        self,
        base: torch.Tensor,
        heads: list[int],
        scales: tuple[float, float],
        cos: torch.Tensor,
        sin: torch.Tensor,
        attention: Attention,
        nodes: torch.Tensor | None,
        chunks: list[slice],
        out: torch.Tensor,
    ) -> None:
        """Write the rows that fork here, one per entry of `heads`, to out [forks, T or U, hidden].

        base: the unablated row [1, T, hidden] as it enters the layer, not changed; scales: the ablation's
        (logit_scale, output_scale); chunks: slices of the forks that pass the MLP together.
        """
        q, k, v = self._qkv(base, cos, sin, nodes)
        ones = torch.ones(1, self.heads, dtype=q.dtype)
        last = nodes is not None
        o_base = attention(q, k, v, ones, ones, last)
        o_ablated = attention(q, k, v, ones * scales[0], ones * scales[1], last)
        delta = (o_ablated - o_base)[0].transpose(0, 1)  # [H, T, D]
        weight = self.out_weight.unflatten(0, (self.heads, -1))  # [H, D, hidden]
        start = (base.index_select(1, nodes) if last else base).clone()
        self._add_product(start, o_base.flatten(2), self.layer.self_attn.o_proj)
        for rows in chunks:
            index = torch.tensor(heads[rows])
            torch.baddbmm(start.expand(len(index), -1, -1), delta[index], weight[index], out=out[rows])
            self._mlp(out[rows])

    def _qkv(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, nodes: torch.Tensor | None):
        attn = self.layer.self_attn
        normed = _norm(x, self.layer.input_layernorm)
        at = normed if nodes is None else normed.index_select(1, nodes)
        q = linear(at, attn.q_proj.weight, attn.q_proj.bias).unflatten(2, (self.heads, -1))
        k = linear(normed, attn.k_proj.weight, attn.k_proj.bias).unflatten(2, (self.kv_heads, -1))
        v = linear(normed, attn.v_proj.weight, attn.v_proj.bias).unflatten(2, (self.kv_heads, -1))
        cut = (lambda table: table) if nodes is None else (lambda table: table.index_select(0, nodes))
        torch.ops.shipsfast.rope_(q, cut(cos), cut(sin))
        torch.ops.shipsfast.rope_(k, cos, sin)
        return q, k, v

    def _mlp(self, x: torch.Tensor) -> None:
        mlp = self.layer.mlp
        normed = _norm(x, self.layer.post_attention_layernorm)
        gate = linear(normed, mlp.gate_proj.weight, mlp.gate_proj.bias)
        up = linear(normed, mlp.up_proj.weight, mlp.up_proj.bias)
        torch.ops.shipsfast.silu_mul_(gate, up)
        self._add_product(x, gate, mlp.down_proj)

    @staticmethod
    def _add_product(x: torch.Tensor, y: torch.Tensor, projection: torch.nn.Linear) -> None:
        """x += projection(y), in place."""
        x.view(-1, x.shape[-1]).addmm_(y.reshape(-1, y.shape[-1]), projection.weight.t())
        if projection.bias is not None:
            x += projection.bias


def _norm(x: torch.Tensor, norm: torch.nn.Module) -> torch.Tensor:
    if x.dtype == torch.float64:
        return norm(x)  # it rounds to float32 on the way, in its own order: only itself repeats that exactly
    out = torch.empty_like(x)
    torch.ops.shipsfast.rms_norm(x, norm.weight, norm.variance_epsilon, out)
    return out
