// The element-wise operations between a decoder layer's matrix products, on the CPU, one pass each.
//
//   rms_norm(x, weight, eps, offset, out)        out = (weight + offset) * x / sqrt(mean(x^2) + eps), per row
//   add_rms_norm_(x, y, weight, eps, offset)     x += rms_norm(y)
//   rope(x, cos, sin, norm_weight, eps, out)     rotary embedding, rotate-half convention; x may be a slice of wider
//                                                rows; with a weight, every head goes through rms_norm first
//   silu_mul(gate_up, out)                       out = gate * sigmoid(gate) * up, gate and up side by side in a row
//   gelu_mul(gate_up, out)                       the same with GELU by tanh
//   forked_gated(change, factor, base, scale, drift, other, bias, gelu, out)
//                                                the same of scale * (factor * change + base + drift * other) + bias, with
//                                                one factor, scale and drift a row; change is overwritten
//
// In torch these are 2 to 6 passes over memory with as many temporaries, which on a CPU costs a layer a
// third of its time. float32 and float64; one row is one thread's work, so results do not depend on threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "ships_exp.h"

namespace {

using shipsfast::exp_of;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr double kGeluFactor = 0.7978845608028654;  // sqrt(2 / pi)
constexpr int64_t kElementsPerTask = 1 << 14;  // less than this is not worth another thread

#define SHIPS_DEFINE(T)                                                                                          \
  SHIPS_CLONES T norm_scale(const T* x, T eps, int64_t size) {                                                   \
    T squares = 0;                                                                                               \
    _Pragma("omp simd reduction(+ : squares)") for (int64_t i = 0; i < size; ++i) squares += x[i] * x[i];        \
    return T(1) / std::sqrt(squares / T(size) + eps);                                                            \
  }                                                                                                              \
  SHIPS_CLONES void norm_row(const T* x, const T* weight, T eps, T offset, int64_t size, T* out) {               \
    const T scale = norm_scale(x, eps, size);                                                                    \
    _Pragma("omp simd") for (int64_t i = 0; i < size; ++i) out[i] = (weight[i] + offset) * (x[i] * scale);       \
  }                                                                                                              \
  SHIPS_CLONES void add_norm_row(const T* y, const T* weight, T eps, T offset, int64_t size, T* x) {             \
    const T scale = norm_scale(y, eps, size);                                                                    \
    _Pragma("omp simd") for (int64_t i = 0; i < size; ++i) x[i] += (weight[i] + offset) * (y[i] * scale);        \
  }                                                                                                              \
  SHIPS_CLONES void rope_token(const T* x, const T* cos, const T* sin, const T* weight, T eps, int64_t heads,    \
                               int64_t half, T* out) {                                                           \
    for (int64_t h = 0; h < heads; ++h, x += 2 * half, out += 2 * half) {                                        \
      if (weight != nullptr) norm_row(x, weight, eps, T(0), 2 * half, out);                                      \
      const T* head = weight == nullptr ? x : out;                                                               \
      _Pragma("omp simd") for (int64_t i = 0; i < half; ++i) {                                                   \
        const T low = head[i], high = head[i + half];                                                            \
        out[i] = low * cos[i] - high * sin[i];                                                                   \
        out[i + half] = high * cos[i + half] + low * sin[i + half];                                              \
      }                                                                                                          \
    }                                                                                                            \
  }                                                                                                              \
  SHIPS_CLONES void silu_mul_row(const T* gate, const T* up, int64_t size, T* out) {                             \
    _Pragma("omp simd") for (int64_t i = 0; i < size; ++i) out[i] = gate[i] / (T(1) + exp_of(-gate[i])) * up[i]; \
  }                                                                                                              \
  SHIPS_CLONES void gelu_mul_row(const T* gate, const T* up, int64_t size, T* out) {                             \
    _Pragma("omp simd") for (int64_t i = 0; i < size; ++i) {                                                     \
      const T g = gate[i];                                                                                       \
      const T steep = T(2 * kGeluFactor) * (g + T(0.044715) * g * g * g);                                        \
      out[i] = g / (T(1) + exp_of(-steep)) * up[i];                                                              \
    }                                                                                                            \
  }

// What goes into the activation of a row that forks; the row may be overwritten with it.
#define SHIPS_DEFINE_FORKED(T)                                                                                   \
  SHIPS_CLONES void forked_row(T* x, T factor, const T* base, T scale, T drift, const T* other, const T* bias,   \
                               int64_t size) {                                                                   \
    _Pragma("omp simd") for (int64_t i = 0; i < size; ++i) x[i] = factor * x[i] + base[i];                       \
    if (other != nullptr) {                                                                                      \
      _Pragma("omp simd") for (int64_t i = 0; i < size; ++i) x[i] += drift * other[i];                           \
    }                                                                                                            \
    _Pragma("omp simd") for (int64_t i = 0; i < size; ++i) x[i] *= scale;                                        \
    if (bias != nullptr) {                                                                                       \
      _Pragma("omp simd") for (int64_t i = 0; i < size; ++i) x[i] += bias[i];                                    \
    }                                                                                                            \
  }

SHIPS_DEFINE(float)
SHIPS_DEFINE(double)
SHIPS_DEFINE_FORKED(float)
SHIPS_DEFINE_FORKED(double)
#undef SHIPS_DEFINE_FORKED
#undef SHIPS_DEFINE

void require(bool condition, const char* op, const char* expected) {
  if (!condition) throw std::runtime_error(std::string("shipsfast::") + op + ": expected " + expected);
}

bool aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % tensor.element_size() == 0;
}

bool same_real_type(const Tensor& a, const Tensor& b) {
  return a.scalar_type() == b.scalar_type() && aligned(a) && aligned(b) &&
         (a.scalar_type() == ScalarType::Float || a.scalar_type() == ScalarType::Double);
}

template <typename F>
void dispatch(const Tensor& tensor, const F& run) {
  if (tensor.scalar_type() == ScalarType::Float) {
    run(float{});
  } else {
    run(double{});
  }
}

template <typename F>
void over_rows(int64_t rows, int64_t row_size, const F& run) {
  const int64_t per_task = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, row_size));
  torch::stable::parallel_for(0, rows, per_task, run);
}

template <bool add>
void norm(const Tensor& x, const Tensor& weight, double eps, double offset, Tensor out) {
  const char* op = add ? "add_rms_norm_" : "rms_norm";
  const int64_t size = weight.numel();
  require(x.is_contiguous() && out.is_contiguous() && weight.is_contiguous(), op, "contiguous tensors");
  require(same_real_type(x, weight) && same_real_type(x, out), op, "one dtype, float32 or float64, at aligned addresses");
  require(x.dim() > 0 && x.size(x.dim() - 1) == size && out.numel() == x.numel(), op, "both [..., D] and weight [D]");
  if (x.numel() == 0) return;
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(x.const_data_ptr());
    const T* scale = static_cast<const T*>(weight.const_data_ptr());
    T* to = static_cast<T*>(out.mutable_data_ptr());
    over_rows(x.numel() / size, size, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        if constexpr (add) {
          add_norm_row(from + r * size, scale, T(eps), T(offset), size, to + r * size);
        } else {
          norm_row(from + r * size, scale, T(eps), T(offset), size, to + r * size);
        }
      }
    });
  });
}

void rms_norm(const Tensor& x, const Tensor& weight, double eps, double offset, Tensor out) {
  norm<false>(x, weight, eps, offset, out);
}

void add_rms_norm_(Tensor x, const Tensor& y, const Tensor& weight, double eps, double offset) {
  norm<true>(y, weight, eps, offset, x);
}

void rope(const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& norm_weight, double eps, Tensor out) {
  require(cos.is_contiguous() && sin.is_contiguous() && out.is_contiguous(), "rope", "contiguous cos, sin and out");
  require(same_real_type(x, cos) && same_real_type(x, sin) && same_real_type(x, out), "rope",
          "one dtype, float32 or float64, at aligned addresses");
  require(x.dim() == 4 && cos.dim() == 2 && sin.dim() == 2 && x.size(1) == cos.size(0) && x.size(3) == cos.size(1) &&
              sin.size(0) == cos.size(0) && sin.size(1) == cos.size(1) && x.size(3) % 2 == 0,
          "rope", "x [B, T, H, D] with D even, cos and sin [T, D]");
  bool same_shape = out.dim() == 4;
  for (int64_t i = 0; same_shape && i < 4; ++i) same_shape = out.size(i) == x.size(i);
  require(same_shape, "rope", "out of the shape of x");
  const bool normed = norm_weight.numel() > 0;
  require(!normed || (norm_weight.numel() == x.size(3) && norm_weight.is_contiguous() && same_real_type(x, norm_weight)),
          "rope", "norm_weight [D] of x's dtype, or empty");
  if (x.numel() == 0) return;
  const int64_t tokens = x.size(1), heads = x.size(2), size = x.size(3);
  const int64_t row_step = x.stride(0), token_step = x.stride(1);
  require(x.stride(3) == 1 && (heads == 1 || x.stride(2) == size), "rope", "x with the heads of a token contiguous");
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(x.const_data_ptr());
    T* to = static_cast<T*>(out.mutable_data_ptr());
    const T* c = static_cast<const T*>(cos.const_data_ptr());
    const T* s = static_cast<const T*>(sin.const_data_ptr());
    const T* weight = normed ? static_cast<const T*>(norm_weight.const_data_ptr()) : nullptr;
    over_rows(x.size(0) * tokens, heads * size, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const int64_t b = r / tokens, t = r % tokens;
        const T* token = from + b * row_step + t * token_step;
        rope_token(token, c + t * size, s + t * size, weight, T(eps), heads, size / 2, to + r * heads * size);
      }
    });
  });
}

template <bool gelu>
void gated(const Tensor& gate_up, Tensor out) {
  const char* op = gelu ? "gelu_mul" : "silu_mul";
  require(gate_up.is_contiguous() && out.is_contiguous(), op, "contiguous tensors");
  require(same_real_type(gate_up, out) && gate_up.dim() == 2 && out.dim() == 2 && gate_up.size(0) == out.size(0) &&
              gate_up.size(1) == 2 * out.size(1),
          op, "gate_up [N, 2 M] and out [N, M] of one dtype, at aligned addresses");
  if (out.numel() == 0) return;
  const int64_t size = out.size(1);
  dispatch(out, [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(gate_up.const_data_ptr());
    T* to = static_cast<T*>(out.mutable_data_ptr());
    over_rows(out.size(0), size, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const T* row = from + 2 * r * size;
        if constexpr (gelu) {
          gelu_mul_row(row, row + size, size, to + r * size);
        } else {
          silu_mul_row(row, row + size, size, to + r * size);
        }
      }
    });
  });
}

void forked_gated(Tensor change, const Tensor& factor, const Tensor& base, const Tensor& scale, const Tensor& drift,
                  const Tensor& other, const Tensor& bias, bool gelu, Tensor out) {
  const char* op = "forked_gated";
  const bool drifts = other.numel() > 0, biased = bias.numel() > 0;
  for (const Tensor* x : {&std::as_const(change), &factor, &base, &scale, &drift, &other, &bias, &std::as_const(out)}) {
    require(x->is_contiguous() && same_real_type(change, *x), op, "contiguous tensors of one dtype, float32 or float64");
  }
  require(change.dim() == 2 && base.dim() == 2 && out.dim() == 2 && base.size(1) == change.size(1) &&
              change.size(0) == out.size(0) && change.size(1) == 2 * out.size(1),
          op, "change and base [N, 2 M], and out [N, M]");
  const int64_t rows = change.size(0), size = out.size(1);
  require(base.size(0) == rows && factor.numel() == rows && scale.numel() == rows, op,
          "base [N, 2 M], factor and scale [N]");
  require(!drifts || (drift.numel() == rows && other.numel() == base.numel()), op, "drift [N] and other [N, 2 M]");
  require(!biased || bias.numel() == 2 * size, op, "bias [2 M]");
  if (out.numel() == 0) return;
  dispatch(out, [&](auto zero) {
    using T = decltype(zero);
    T* from = static_cast<T*>(change.mutable_data_ptr());
    T* to = static_cast<T*>(out.mutable_data_ptr());
    const T* own = static_cast<const T*>(base.const_data_ptr());
    const T* factors = static_cast<const T*>(factor.const_data_ptr());
    const T* scales = static_cast<const T*>(scale.const_data_ptr());
    const T* drifting = drifts ? static_cast<const T*>(drift.const_data_ptr()) : nullptr;
    const T* beside = drifts ? static_cast<const T*>(other.const_data_ptr()) : nullptr;
    const T* added = biased ? static_cast<const T*>(bias.const_data_ptr()) : nullptr;
    over_rows(rows, size, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        T* row = from + 2 * r * size;
        const int64_t at = 2 * r * size;
        forked_row(row, factors[r], own + at, scales[r], drifts ? drifting[r] : T(0), drifts ? beside + at : nullptr, added,
                   2 * size);
        if (gelu) {
          gelu_mul_row(row, row + size, size, to + r * size);
        } else {
          silu_mul_row(row, row + size, size, to + r * size);
        }
      }
    });
  });
}

void silu_mul(const Tensor& gate_up, Tensor out) { gated<false>(gate_up, out); }

void gelu_mul(const Tensor& gate_up, Tensor out) { gated<true>(gate_up, out); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(shipsfast, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps, float offset, Tensor(a!) out) -> ()");
  m.def("add_rms_norm_(Tensor(a!) x, Tensor y, Tensor weight, float eps, float offset) -> ()");
  m.def("rope(Tensor x, Tensor cos, Tensor sin, Tensor norm_weight, float eps, Tensor(a!) out) -> ()");
  m.def("silu_mul(Tensor gate_up, Tensor(a!) out) -> ()");
  m.def("gelu_mul(Tensor gate_up, Tensor(a!) out) -> ()");
  m.def(
      "forked_gated(Tensor(b!) change, Tensor factor, Tensor base, Tensor scale, Tensor drift, Tensor other, Tensor bias, "
      "bool gelu, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(shipsfast, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("add_rms_norm_", TORCH_BOX(&add_rms_norm_));
  m.impl("rope", TORCH_BOX(&rope));
  m.impl("silu_mul", TORCH_BOX(&silu_mul));
  m.impl("gelu_mul", TORCH_BOX(&gelu_mul));
  m.impl("forked_gated", TORCH_BOX(&forked_gated));
}
