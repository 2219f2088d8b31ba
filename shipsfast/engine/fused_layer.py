"""A faster way through the decoder layers of Llama-like models.

The model's own modules stay the oracle (growing_batch.py runs them for every other model); what runs here gives
the same numbers up to rounding. A layer of this form

    x += o_proj(attention(rope(q_proj(n)), rope(k_proj(n)), v_proj(n))),   n = rms_norm(x)
    x += down_proj(act(gate_proj(m)) * up_proj(m)),                        m = rms_norm(x)

is worked on in place: the residual additions are part of the matrix products, and what lies between the
products takes one pass each (ops/layer_ops.py). Rows that fork in a layer share the base row's queries,
keys and values, and differ from it by one head's output through that head's slice of o_proj:

    y_i = o_proj(o_base) + W_o[:, heads i] (o_ablated - o_base)[heads i],   x_i = x_base + y_i

so the base row itself comes out of the same step, and passes the MLP with them; their gate and up products follow from
the base row's too (forked_rows.py). Qwen 3 normalises every head of
q and k before its rotary embedding; Gemma 2 adds rms_norm(y) instead of y, after attention and after the MLP.
On a CPU with MKL, the weights of a layer are packed once for its many chunks of equal size.

In a half-precision model on the Triton path the residual stream x may be in float32, and everything else as it was: only
the products' sums go into it, and they are float32 anyway. On a CPU it always is, as are norms, softmax and all other sums; there
products are in half precision where the processor is faster at it, and in float32 where it is not (ops/half_products.py).
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator

import torch
from torch.nn.functional import linear
from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from ..models.own_attention import is_patched
from ..ops import mixed_products
from ..ops.extension import extension_status
from ..ops.half_products import products_dtype
from ..ops.layer_ops import small_ops
from ..ops.masks import LayerMask
from ..ops.mixed_products import add_product_, sums_of_products
from .forked_rows import ForkedRows, pays

LAYERS = (LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer, Qwen3DecoderLayer, Gemma2DecoderLayer)
ACTIVATIONS = {"SiLUActivation": "silu", "SiLU": "silu", "GELUTanh": "gelu"}
CPP_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CAPTURING = "transformers.utils.output_capturing"
# By which library weights are packed on a CPU, by the dtype of products.
PACKS = {torch.float32: "mkl"} if torch.backends.mkl.is_available() else {}
PACKS |= {torch.bfloat16: "onednn"} if torch.backends.mkldnn.is_available() else {}
# attention(q, k, v, mask, trimmed) -> [B, TQ, H, D]; q, k, v [B, T, heads, D]
Attention = Callable[..., torch.Tensor]


def why_not(
    layers: list[torch.nn.Module], dtype: torch.dtype, device: torch.device, backend: str
) -> str | None:
    """Why these decoder layers cannot go through this file, None if they can. backend: of attention, resolved."""
    if backend != "triton":
        if device.type != "cpu":
            return f"attention backend {backend} on {device.type}, where the small operations are Triton's"
        if not extension_status()[0]:
            return "the native extension is not built"
        if not hasattr(torch.ops.shipsfast, "add_"):
            return "the native extension is of an older version: build it again"
    if dtype not in (TRITON_DTYPES if backend == "triton" else CPP_DTYPES):
        return f"dtype {dtype}"
    for layer in layers:
        if type(layer) not in LAYERS:
            return f"{type(layer).__name__} is not one of {', '.join(c.__name__ for c in LAYERS)}"
        own = type(layer).__module__
        if is_patched(getattr(sys.modules[own], "apply_rotary_pos_emb", None)):
            return f"{own}.apply_rotary_pos_emb is not transformers' own"
        if type(layer.mlp.act_fn).__name__ not in ACTIVATIONS:
            return f"activation {type(layer.mlp.act_fn).__name__}"
        for name, module in layer.named_modules():
            if (name in ("self_attn", "mlp") or name.endswith("norm")) and type(module).__module__ != own:
                return f"{name} is not the model family's own"
            if type(module).__module__ == own and is_patched(type(module).forward):
                return f"{type(module).__name__}.forward is not transformers' own"
            # The layer's own hooks run: it is called as ever, only its forward is replaced.
            if "forward" in module.__dict__ or module is not layer and _hooks(module):
                return f"{name or 'the layer'} carries hooks or a forward of its own"
            if name.endswith("_proj") and type(module) is not torch.nn.Linear:
                return f"{name} is {type(module).__name__}"
            # Asked without reading it: a quantised weight is a parameter of a class of its own.
            if name.endswith("_proj") and type(module.weight) not in (torch.nn.Parameter, torch.Tensor):
                return f"the weight of {name} is a {type(module.weight).__name__}"
        for name, parameter in layer.named_parameters():
            if parameter.dtype != dtype:
                return f"{name} is in {str(parameter.dtype).removeprefix('torch.')}"
            if not parameter.is_meta and parameter.data_ptr() % parameter.element_size():
                return f"{name} lies at an address that is no multiple of its numbers' size, as in its file"
    return None


def why_no_fp32_residual(dtype: torch.dtype, device: torch.device, backend: str, head: str) -> str | None:
    """Why rows that go this way cannot keep their residual stream in float32, None if they can. head: the precision of
    the model's output head, which has to take what they end in."""
    if dtype.itemsize < 4 and head != "float32":
        return "the output head is not a plain linear layer"
    if dtype.itemsize >= 4:
        return f"the model is in {str(dtype).removeprefix('torch.')} as it is"
    return mixed_products.why_not(dtype, device)


def why_no_half_residual(dtype: torch.dtype, backend: str) -> str | None:
    """Why rows that go this way cannot keep their residual stream in the model's half precision, None if they can."""
    if backend == "triton" or dtype.itemsize >= 4:
        return None
    return "on a CPU the residual stream of a half-precision model is in float32, as layers='fused_fp32_residual' says"


def dtype_of_products(dtype: torch.dtype, backend: str) -> torch.dtype:
    """In which the products of a model of this dtype run. backend: of attention, resolved."""
    return dtype if backend == "triton" else products_dtype(dtype)


def loaded_bytes(layer: torch.nn.Module, products: torch.dtype, device: torch.device) -> int:
    """What `FusedLayer.loaded` holds at most: weights side by side and, on a CPU, packed. products: their dtype."""
    own = sum(p.numel() * products.itemsize for p in layer.parameters())
    return own * (1 + (device.type == "cpu" and products in PACKS))


def base_row_bytes(layer: torch.nn.Module, products: torch.dtype) -> int:
    """What `forks` holds of the base row beside a chunk, per token, at most: gate and up, and of a second norm as many."""
    second = type(layer) is Gemma2DecoderLayer
    return 2 * len(layer.mlp.gate_proj.weight) * products.itemsize * (1 + second)


def _wide(dtype: torch.dtype, backend: str) -> torch.dtype:
    return dtype if backend == "triton" else torch.promote_types(dtype, torch.float32)


def joins(backend: str) -> bool:
    """Whether a decoder keeps all layers loaded: on a GPU, weights side by side would be there twice, and a product of
    few rows takes as long in parts."""
    return backend != "triton"


def _hooks(module: torch.nn.Module) -> list[Callable]:
    """Hooks that want to see or change something.

    transformers leaves some of its own on a model that was ever asked for hidden states or attentions; they do
    nothing in a call that does not ask.
    """
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return [hook for hook in hooks if getattr(hook, "__module__", None) != CAPTURING]


@functools.cache
def _packs(dtype: torch.dtype) -> bool:
    """Whether weights are packed for products in this dtype: oneDNN may refuse on processors where its plain products run."""
    if PACKS.get(dtype) != "onednn":
        return dtype in PACKS
    with torch.inference_mode():
        x = torch.ones(2, 2, dtype=dtype)
        try:
            packed = torch.ops.mkldnn._reorder_linear_weight(x, 2)
            found = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
        except (RuntimeError, AttributeError):
            return False
    return bool((found == 2).all())


class Product:
    """x @ W^T + b of one or more linear layers side by side, their outputs concatenated.

    On a CPU, weights are packed for inputs of `rows` rows: MKL or oneDNN then skips its own packing, which costs 3 to 15 % of
    a product of cache-sized chunks. dtype: of inputs and outputs; weights of another one are converted while they are loaded.
    """

    def __init__(self, dtype: torch.dtype, *layers: torch.nn.Linear) -> None:
        self.dtype, self.layers = dtype, layers
        self.width = sum(layer.out_features for layer in layers)
        self.weight: torch.Tensor | None = None  # [width, in]
        self.bias: torch.Tensor | None = None
        self._packed: torch.Tensor | None = None
        self._size = 0

    def load(self, rows: int) -> None:
        """Get ready for inputs, most of them of `rows` rows; 0 for none worth packing for.

        Without it a product runs too, one layer after the other.
        """
        weights = [layer.weight for layer in self.layers]
        self.weight = (torch.cat(weights) if len(weights) > 1 else weights[0]).to(self.dtype)
        biases = [layer.bias for layer in self.layers]
        if any(b is not None for b in biases):
            zeros = [weights[0].new_zeros(layer.out_features) for layer in self.layers]
            self.bias = torch.cat([z if b is None else b for b, z in zip(biases, zeros, strict=True)])
            self.bias = self.bias.to(self.dtype)
        if rows and self.weight.device.type == "cpu" and _packs(self.dtype):
            if PACKS[self.dtype] == "mkl":
                self._packed = torch.ops.mkl._mkl_reorder_linear_weight(self.weight, rows)
            else:
                self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, rows)
            self._size = rows

    def unload(self) -> None:
        self.weight = self.bias = self._packed = None
        self._size = 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, in] -> [rows, width]"""
        if self.weight is None:
            out = x.new_empty(len(x), self.width)
            for layer, part in zip(
                self.layers, out.split([y.out_features for y in self.layers], 1), strict=True
            ):
                weight = layer.weight.to(self.dtype).t()
                if layer.bias is None:
                    torch.mm(x, weight, out=part)
                else:
                    torch.addmm(layer.bias.to(self.dtype), x, weight, out=part)
            return out
        if len(x) == self._size:
            if PACKS[self.dtype] == "mkl":
                return torch.ops.mkl._mkl_linear(x, self._packed, self.weight, self.bias, self._size)
            return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return linear(x, self.weight, self.bias)

    def without_bias(self, x: torch.Tensor) -> torch.Tensor:
        """x @ W^T. Inside `load`."""
        return linear(x, self.weight)

    def add_to(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """x += self(y), in place."""
        if len(y) == self._size:
            x += self(y)
            return
        (layer,) = self.layers  # side by side, sums would overlap
        weight = layer.weight.to(self.dtype) if self.weight is None else self.weight
        add_product_(x, y, weight.t())
        if layer.bias is not None:
            x += layer.bias


class FusedLayer:
    """One decoder layer, applied to rows of residual streams [rows, T, hidden]. Use inside `loaded`.

    backend: of attention, resolved; the small operations are Triton's where it is. attention: the dtype of what enters attention
    and comes out of it; by default, on a CPU, float32 in a half-precision model.
    """

    def __init__(
        self,
        layer: torch.nn.Module,
        num_heads: int,
        num_kv_heads: int,
        backend: str,
        attention: torch.dtype | None = None,
    ) -> None:
        attn, mlp = layer.self_attn, layer.mlp
        self.dtype = mlp.gate_proj.weight.dtype
        self.products = dtype_of_products(self.dtype, backend)
        self.attention = attention or _wide(self.dtype, backend)
        # Products come out of the processor's units rounded, and are added to a wider stream.
        self._added_apart = backend != "triton" and self.products.itemsize < 4
        self.heads, self.kv_heads = num_heads, num_kv_heads
        self.ops = small_ops(backend, self.products, self.attention)
        self.scaling = attn.head_dim**-0.5 if attn.scaling is None else attn.scaling
        self.softcap = getattr(attn, "attn_logit_softcapping", None)
        self.activation = ACTIVATIONS[type(mlp.act_fn).__name__]
        product = functools.partial(Product, self.products)
        self.q = product(attn.q_proj)
        self.kv = product(attn.k_proj, attn.v_proj)
        self.qkv = product(attn.q_proj, attn.k_proj, attn.v_proj)
        self.out = product(attn.o_proj)
        self.gate_up = product(mlp.gate_proj, mlp.up_proj)
        self.down = product(mlp.down_proj)
        self.q_norm, self.k_norm = getattr(attn, "q_norm", None), getattr(attn, "k_norm", None)
        self.before_attention = layer.input_layernorm
        self.after_attention = self.after_mlp = None  # norms of what is added to the residual stream
        self.before_mlp = layer.post_attention_layernorm
        if isinstance(layer, Gemma2DecoderLayer):
            self.after_attention = layer.post_attention_layernorm
            self.before_mlp = layer.pre_feedforward_layernorm
            self.after_mlp = layer.post_feedforward_layernorm

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
        del q, k, v
        if nodes is not None:
            x = x.index_select(1, nodes)
        self.add(self.out, x, out.flatten(2).flatten(0, 1), self.after_attention)
        del out
        self.mlp(x)
        return x

    def forks(
        self,
        base: torch.Tensor,
        heads: list[list[int]],
        ways: list[int],
        mask: LayerMask,
        every: LayerMask,
        cos: torch.Tensor,
        sin: torch.Tensor,
        attention: Attention,
        nodes: torch.Tensor | None,
        most: int,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """Write the rows that fork here, one per entry of `heads`, to out [forks, T or U, hidden].

        base: row 0 [1, T, hidden] as it enters the layer, not changed; heads: what each fork has off here beyond
        row 0, the same number for all; ways: by which of the W ablations; mask: row 0's own; every: W rows with every head off
        (one pass gives them all, as heads do not see each other in attention); most: rows that pass the MLP together, at most.
        Returns row 0 as it leaves the layer, [1, T or U, hidden].
        """
        q, k, v = self._qkv(base, cos, sin, nodes)
        last = nodes is not None
        own, other = (attention(q, k, v, each, last) for each in (mask, every))
        del q, k, v
        start = base.index_select(1, nodes) if last else base
        return ForkedRows(self, start, own, other, heads, ways).write(out, most)

    def by_rank(self, tokens: int, rank: int, forks: int) -> bool:
        """Whether rows that fork take their gate and up products from the base row's (forked_rows.py)."""
        hidden = self.gate_up.layers[0].in_features
        second = self.after_attention is not None
        return pays(tokens, hidden, rank, forks, second_norm=second, dtype=self.dtype)

    def _qkv(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, nodes: torch.Tensor | None):
        normed = self.ops.rms_norm(x.flatten(0, 1), self.before_attention)
        if nodes is None:
            qkv = self.qkv(normed).view(*x.shape[:2], -1)
            q, kv = qkv.split([self.q.width, self.kv.width], 2)
            at = (cos, sin)
        else:
            q = self.q(normed.view(x.shape).index_select(1, nodes).flatten(0, 1)).view(len(x), len(nodes), -1)
            kv = self.kv(normed).view(*x.shape[:2], -1)
            at = (cos.index_select(0, nodes), sin.index_select(0, nodes))
        q = self.ops.rope(q.unflatten(2, (self.heads, -1)), *at, self.q_norm)
        return q, *self._rotated(kv, cos, sin)

    def keys_values(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor):
        """Of x [B, T, hidden], which is only read: k and v [B, T, HKV, D] as attention takes them."""
        normed = self.ops.rms_norm(x.flatten(0, 1), self.before_attention)
        return self._rotated(self.kv(normed).view(*x.shape[:2], -1), cos, sin)

    def _rotated(self, kv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor):
        k, v = kv.unflatten(2, (2 * self.kv_heads, -1)).chunk(2, 2)
        return self.ops.rope(k, cos, sin, self.k_norm), self.ops.values(v)

    def mlp(self, x: torch.Tensor, inner: torch.Tensor | None = None) -> None:
        """x += mlp(norm(x)), in place. inner: what enters down_proj, where it is known."""
        if inner is None:
            gate_up = self.gate_up(self.ops.rms_norm(x.flatten(0, 1), self.before_mlp))
            inner = self.ops.gated(gate_up, self.activation)
            del gate_up  # before the next product makes its own
        self.add(self.down, x, inner, self.after_mlp)

    def add(self, product: Product, x: torch.Tensor, y: torch.Tensor, norm: torch.nn.Module | None) -> None:
        """x += product(y), or norm(product(y)), in place."""
        x, y = x.flatten(0, 1), y.to(self.products)
        if norm is not None:
            self.ops.add_rms_norm_(x, product(y), norm)
        elif self._added_apart:
            torch.ops.shipsfast.add_(x, product(y))
        else:
            product.add_to(x, y)

    def add_batched(
        self, start: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, out: torch.Tensor
    ) -> None:
        """out [B, N, M] = start + y [B, N, K] @ weight [B, K, M]; y and weight in the dtype of products."""
        if self._added_apart:
            out[:] = start
            torch.ops.shipsfast.add_(out, torch.bmm(y, weight))
        else:
            sums_of_products(start, y, weight, out)
