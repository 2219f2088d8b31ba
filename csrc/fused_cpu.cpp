// The element-wise operations between a decoder layer's matrix products, on the CPU, one pass each.
//
//   rms_norm(x, weight, eps, offset, out)        out = (weight + offset) * x / sqrt(mean(x^2) + eps), per row
//   add_rms_norm_(x, y, weight, eps, offset)     x += rms_norm(y)
//   add_(x, y)                                   x += y
//   rope(x, cos, sin, norm_weight, eps, out)     rotary embedding, rotate-half convention; x may be a slice of wider
//                                                rows; with a weight, every head goes through rms_norm first
//   silu_mul(gate_up, out)                       out = gate * sigmoid(gate) * up, gate and up side by side in a row
//   gelu_mul(gate_up, out)                       the same with GELU by tanh
//   forked_gated(change, factor, base, scale, drift, other, bias, gelu, out)
//                                                the same of scale * (factor * change + base + drift * other) + bias, with
//                                                one factor, scale and drift a row
//
// In torch these are 2 to 6 passes over memory with as many temporaries, which on a CPU costs a layer a
// third of its time. float32 and float64; what enters or leaves a matrix product may be in half precision beside float32,
// and is rounded once, when it is written. One row is one thread's work, so results do not depend on threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "ships_attention.h"
#include "ships_cpu.h"
#include "ships_exp.h"

namespace {

using namespace shipsfast;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr double kGeluFactor = 0.7978845608028654;  // sqrt(2 / pi)
constexpr int64_t kSmallTask = 1 << 14;  // numbers; less than this is not worth another thread
constexpr int64_t kPiece = 256;          // of a row, that stay in registers and the nearest cache

// In all of these T is float or double, S is T or half precision.

template <typename T, typename S>
SHIPS_ALWAYS_INLINE T norm_scale(const S* x, T eps, int64_t size) {
  T squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < size; ++i) {
    const T value = widened(x[i]);
    squares += value * value;
  }
  return T(1) / std::sqrt(squares / T(size) + eps);
}

template <typename T, typename From, typename To>
struct Norm {
  const From* x;    // [N, size]
  const T* weight;  // [size]
  T eps, offset;
  int64_t size;
  To* out;          // [N, size]
};

template <typename T, typename S>
SHIPS_ALWAYS_INLINE void norm_rows(const Norm<T, T, S>& call, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const T* x = call.x + r * call.size;
    S* out = call.out + r * call.size;
    const T scale = norm_scale<T>(x, call.eps, call.size);
#pragma omp simd
    for (int64_t i = 0; i < call.size; ++i) round_to(out[i], (call.weight[i] + call.offset) * (x[i] * scale));
  }
}

template <typename T, typename S>
SHIPS_ALWAYS_INLINE void add_norm_rows(const Norm<T, S, T>& call, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const S* y = call.x + r * call.size;
    T* x = call.out + r * call.size;
    const T scale = norm_scale<T>(y, call.eps, call.size);
#pragma omp simd
    for (int64_t i = 0; i < call.size; ++i) x[i] += (call.weight[i] + call.offset) * (widened(y[i]) * scale);
  }
}

template <typename T, typename S>
SHIPS_ALWAYS_INLINE void add_rows(const S* y, T* x, int64_t begin, int64_t end) {
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) x[i] += widened(y[i]);
}

template <typename T, typename From>
struct Rope {
  const From* x;              // [B, tokens, heads, 2 half]
  int64_t row_step, token_step, tokens, heads, half;
  const T *cos, *sin;         // [tokens, 2 half]
  const T* weight;            // [2 half] or null
  T eps;
};

template <typename T, typename From, typename To>
SHIPS_ALWAYS_INLINE void rotate(const From* head, const T* cos, const T* sin, int64_t half, To* to) {
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    const T low = widened(head[i]), high = widened(head[i + half]);
    round_to(to[i], low * cos[i] - high * sin[i]);
    round_to(to[i + half], high * cos[i + half] + low * sin[i + half]);
  }
}

// Heads in T, rounded when they are done. head: room for one that is normalised first.
template <typename T, typename From, typename To>
SHIPS_ALWAYS_INLINE void rope_rows(const Rope<T, From>& call, To* out, T* head, int64_t begin, int64_t end) {
  const int64_t size = 2 * call.half;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t t = r % call.tokens;
    const From* x = call.x + r / call.tokens * call.row_step + t * call.token_step;
    const T *cos = call.cos + t * size, *sin = call.sin + t * size;
    To* to = out + r * call.heads * size;
    for (int64_t h = 0; h < call.heads; ++h, x += size, to += size) {
      if (call.weight == nullptr) {
        rotate(x, cos, sin, call.half, to);
        continue;
      }
      const T scale = norm_scale<T>(x, call.eps, size);
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) head[i] = call.weight[i] * (widened(x[i]) * scale);
      rotate(head, cos, sin, call.half, to);
    }
  }
}

template <bool gelu, typename T>
SHIPS_ALWAYS_INLINE T activated(T gate) {
  if constexpr (gelu) {
    const T steep = T(2 * kGeluFactor) * (gate + T(0.044715) * gate * gate * gate);
    return gate / (T(1) + exp_of(-steep));
  } else {
    return gate / (T(1) + exp_of(-gate));
  }
}

template <bool gelu, typename T, typename S>
SHIPS_ALWAYS_INLINE void gated_rows(const S* gate_up, int64_t size, S* out, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const S *gate = gate_up + 2 * r * size, *up = gate + size;
    S* to = out + r * size;
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) round_to(to[i], activated<gelu>(widened(gate[i])) * widened(up[i]));
  }
}

template <typename T, typename S>
struct Forked {
  const S *change, *base, *other;       // [N, 2 size]; other may be null
  const T *factor, *scale, *drift;      // [N]
  const T* bias;                        // [2 size] or null
  int64_t size;
  S* out;                               // [N, size]
};

// What goes into the activation of row r, numbers at .. at + count - 1 of its 2 size.
template <typename T, typename S>
SHIPS_ALWAYS_INLINE void forked_piece(const Forked<T, S>& call, int64_t r, int64_t at, int64_t count, T* x) {
  const int64_t place = 2 * r * call.size + at;
  const S *change = call.change + place, *base = call.base + place;
  const T factor = call.factor[r], scale = call.scale[r];
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) x[i] = factor * widened(change[i]) + widened(base[i]);
  if (call.other != nullptr) {
    const S* other = call.other + place;
    const T drift = call.drift[r];
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) x[i] += drift * widened(other[i]);
  }
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) x[i] *= scale;
  if (call.bias != nullptr) {
    const T* bias = call.bias + at;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) x[i] += bias[i];
  }
}

template <bool gelu, typename T, typename S>
SHIPS_ALWAYS_INLINE void forked_rows(const Forked<T, S>& call, int64_t begin, int64_t end) {
  T gate[kPiece], up[kPiece];
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t at = 0; at < call.size; at += kPiece) {
      const int64_t count = std::min(kPiece, call.size - at);
      forked_piece(call, r, at, count, gate);
      forked_piece(call, r, call.size + at, count, up);
      S* to = call.out + r * call.size + at;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) round_to(to[i], activated<gelu>(gate[i]) * up[i]);
    }
  }
}

bool aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % tensor.element_size() == 0;
}

bool plain(const Tensor& tensor) { return tensor.is_contiguous() && aligned(tensor); }

bool is_wide(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Float || tensor.scalar_type() == ScalarType::Double;
}

// Sums in the type of `wide` go with factors of that type, and float32 with half precision.
bool fits(const Tensor& wide, const Tensor& narrow) {
  const ScalarType type = narrow.scalar_type();
  return type == wide.scalar_type() || (wide.scalar_type() == ScalarType::Float && is_storage(type) && type != ScalarType::Double);
}

constexpr const char* kOneType = "one dtype, float32 or float64, at aligned addresses; beside float32 half precision";

template <typename F>
void over_rows(int64_t rows, int64_t row_size, const F& run) {
  const int64_t per_task = std::max<int64_t>(1, kSmallTask / std::max<int64_t>(1, row_size));
  torch::stable::parallel_for(0, rows, per_task, run);
}

template <typename T>
const T* read(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* written(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

void check_norm(const char* op, const Tensor& wide, const Tensor& other, const Tensor& weight) {
  require(op, plain(wide) && plain(other) && plain(weight) && is_wide(wide), "contiguous tensors at aligned addresses");
  require(op, weight.scalar_type() == wide.scalar_type() && fits(wide, other), kOneType);
  require(op, wide.dim() > 0 && wide.size(wide.dim() - 1) == weight.numel() && other.numel() == wide.numel(),
          "both [..., D] and weight [D]");
}

void rms_norm(const Tensor& x, const Tensor& weight, double eps, double offset, Tensor out) {
  check_norm("rms_norm", x, out, weight);
  if (x.numel() == 0) return;
  with_storage(out.scalar_type(), [&](auto zero) {
    using S = decltype(zero);
    using T = Wide<S>;
    const Norm<T, T, S> call{read<T>(x), read<T>(weight), T(eps), T(offset), weight.numel(), written<S>(out)};
    const auto go = variant<&norm_rows<T, S>>();
    over_rows(x.numel() / call.size, call.size, [&](int64_t begin, int64_t end) { go(call, begin, end); });
  });
}

void add_rms_norm_(Tensor x, const Tensor& y, const Tensor& weight, double eps, double offset) {
  check_norm("add_rms_norm_", x, y, weight);
  if (x.numel() == 0) return;
  with_storage(y.scalar_type(), [&](auto zero) {
    using S = decltype(zero);
    using T = Wide<S>;
    const Norm<T, S, T> call{read<S>(y), read<T>(weight), T(eps), T(offset), weight.numel(), written<T>(x)};
    const auto go = variant<&add_norm_rows<T, S>>();
    over_rows(x.numel() / call.size, call.size, [&](int64_t begin, int64_t end) { go(call, begin, end); });
  });
}

void add_(Tensor x, const Tensor& y) {
  require("add_", plain(x) && plain(y) && is_wide(x) && fits(x, y) && x.numel() == y.numel(),
          "contiguous tensors of one size, x in float32 or float64, y the same or half precision");
  if (x.numel() == 0) return;
  with_storage(y.scalar_type(), [&](auto zero) {
    using S = decltype(zero);
    using T = Wide<S>;
    const auto go = variant<&add_rows<T, S>>();
    over_rows(x.numel(), 1, [&](int64_t begin, int64_t end) { go(read<S>(y), written<T>(x), begin, end); });
  });
}

template <typename To, typename T, typename From>
void rope_to(const Rope<T, From>& call, int64_t rows, Tensor& out) {
  const int64_t size = 2 * call.half;
  const auto go = variant<&rope_rows<T, From, To>>();
  over_rows(rows * call.tokens, call.heads * size, [&](int64_t begin, int64_t end) {
    std::vector<T> head(size);
    go(call, written<To>(out), head.data(), begin, end);
  });
}

void rope(const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& norm_weight, double eps, Tensor out) {
  require("rope", plain(cos) && plain(sin) && plain(out) && aligned(x), "contiguous cos, sin and out, at aligned addresses");
  require("rope", is_wide(cos) && sin.scalar_type() == cos.scalar_type() && fits(cos, x) &&
              (out.scalar_type() == x.scalar_type() || out.scalar_type() == cos.scalar_type()),
          kOneType);
  require("rope", x.dim() == 4 && cos.dim() == 2 && sin.dim() == 2 && x.size(1) == cos.size(0) && x.size(3) == cos.size(1) &&
              sin.size(0) == cos.size(0) && sin.size(1) == cos.size(1) && x.size(3) % 2 == 0,
          "x [B, T, H, D] with D even, cos and sin [T, D]");
  bool same_shape = out.dim() == 4;
  for (int64_t i = 0; same_shape && i < 4; ++i) same_shape = out.size(i) == x.size(i);
  require("rope", same_shape, "out of the shape of x");
  const bool normed = norm_weight.numel() > 0;
  require("rope", !normed || (norm_weight.numel() == x.size(3) && plain(norm_weight) && norm_weight.scalar_type() == cos.scalar_type()),
          "norm_weight [D] of the dtype of cos, or empty");
  if (x.numel() == 0) return;
  const int64_t heads = x.size(2), size = x.size(3);
  require("rope", x.stride(3) == 1 && (heads == 1 || x.stride(2) == size), "x with the heads of a token contiguous");
  with_storage(x.scalar_type(), [&](auto zero) {
    using S = decltype(zero);
    using T = Wide<S>;
    const Rope<T, S> call{read<S>(x), x.stride(0), x.stride(1), x.size(1), heads, size / 2, read<T>(cos), read<T>(sin),
                          normed ? read<T>(norm_weight) : nullptr, T(eps)};
    if (out.scalar_type() == x.scalar_type()) {
      rope_to<S>(call, x.size(0), out);
    } else {
      rope_to<T>(call, x.size(0), out);
    }
  });
}

template <bool gelu>
void gated(const Tensor& gate_up, Tensor out) {
  const char* op = gelu ? "gelu_mul" : "silu_mul";
  require(op, plain(gate_up) && plain(out), "contiguous tensors at aligned addresses");
  require(op, is_storage(out.scalar_type()) && gate_up.scalar_type() == out.scalar_type() && gate_up.dim() == 2 &&
              out.dim() == 2 && gate_up.size(0) == out.size(0) && gate_up.size(1) == 2 * out.size(1),
          "gate_up [N, 2 M] and out [N, M] of one dtype");
  if (out.numel() == 0) return;
  const int64_t size = out.size(1);
  with_storage(out.scalar_type(), [&](auto zero) {
    using S = decltype(zero);
    const auto go = variant<&gated_rows<gelu, Wide<S>, S>>();
    over_rows(out.size(0), size, [&](int64_t begin, int64_t end) { go(read<S>(gate_up), size, written<S>(out), begin, end); });
  });
}

void forked_gated(const Tensor& change, const Tensor& factor, const Tensor& base, const Tensor& scale, const Tensor& drift,
                  const Tensor& other, const Tensor& bias, bool gelu, Tensor out) {
  const char* op = "forked_gated";
  const bool drifts = other.numel() > 0, biased = bias.numel() > 0;
  const auto is = [&](const Tensor& x, const Tensor& like) { return plain(x) && (x.numel() == 0 || x.scalar_type() == like.scalar_type()); };
  for (const Tensor* x : {&base, &other, static_cast<const Tensor*>(&out)}) require(op, is(*x, change), "contiguous tensors of one dtype");
  for (const Tensor* x : {&scale, &drift, &bias}) require(op, is(*x, factor), "contiguous tensors of one dtype");
  require(op, plain(change) && plain(factor) && is_wide(factor) && fits(factor, change), kOneType);
  require(op, change.dim() == 2 && base.dim() == 2 && out.dim() == 2 && base.size(1) == change.size(1) &&
              change.size(0) == out.size(0) && change.size(1) == 2 * out.size(1),
          "change and base [N, 2 M], and out [N, M]");
  const int64_t rows = change.size(0), size = out.size(1);
  require(op, base.size(0) == rows && factor.numel() == rows && scale.numel() == rows, "base [N, 2 M], factor and scale [N]");
  require(op, !drifts || (drift.numel() == rows && other.numel() == base.numel()), "drift [N] and other [N, 2 M]");
  require(op, !biased || bias.numel() == 2 * size, "bias [2 M]");
  if (out.numel() == 0) return;
  with_storage(change.scalar_type(), [&](auto zero) {
    using S = decltype(zero);
    using T = Wide<S>;
    const Forked<T, S> call{read<S>(change), read<S>(base), drifts ? read<S>(other) : nullptr,
                            read<T>(factor), read<T>(scale), drifts ? read<T>(drift) : nullptr,
                            biased ? read<T>(bias) : nullptr, size, written<S>(out)};
    const auto go = gelu ? variant<&forked_rows<true, T, S>>() : variant<&forked_rows<false, T, S>>();
    over_rows(rows, size, [&](int64_t begin, int64_t end) { go(call, begin, end); });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(shipsfast, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps, float offset, Tensor(a!) out) -> ()");
  m.def("add_rms_norm_(Tensor(a!) x, Tensor y, Tensor weight, float eps, float offset) -> ()");
  m.def("add_(Tensor(a!) x, Tensor y) -> ()");
  m.def("rope(Tensor x, Tensor cos, Tensor sin, Tensor norm_weight, float eps, Tensor(a!) out) -> ()");
  m.def("silu_mul(Tensor gate_up, Tensor(a!) out) -> ()");
  m.def("gelu_mul(Tensor gate_up, Tensor(a!) out) -> ()");
  m.def(
      "forked_gated(Tensor change, Tensor factor, Tensor base, Tensor scale, Tensor drift, Tensor other, Tensor bias, "
      "bool gelu, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(shipsfast, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("add_rms_norm_", TORCH_BOX(&add_rms_norm_));
  m.impl("add_", TORCH_BOX(&add_));
  m.impl("rope", TORCH_BOX(&rope));
  m.impl("silu_mul", TORCH_BOX(&gated<false>));
  m.impl("gelu_mul", TORCH_BOX(&gated<true>));
  m.impl("forked_gated", TORCH_BOX(&forked_gated));
}
