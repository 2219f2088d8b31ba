// The element-wise operations between a decoder layer's matrix products, on the CPU, one pass each.
//
//   rms_norm(x, weight, eps, out)   out = weight * x / sqrt(mean(x^2) + eps), per row
//   rope(x, cos, sin, out)          rotary embedding, rotate-half convention; x may be a slice of wider rows
//   silu_mul(gate_up, out)          out = gate * sigmoid(gate) * up, gate and up side by side in a row
//
// In torch these are 5, 5 and 2 passes over memory with as many temporaries, which on a CPU costs a layer a
// third of its time. float32 and float64; one row is one thread's work, so results do not depend on threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "ships_exp.h"

namespace {

using shipsfast::exp_of;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kElementsPerTask = 1 << 14;  // less than this is not worth another thread

#define SHIPS_DEFINE(T)                                                                                          \
  SHIPS_CLONES void norm_row(const T* x, const T* weight, T eps, int64_t size, T* out) {                         \
    T squares = 0;                                                                                               \
    _Pragma("omp simd reduction(+ : squares)") for (int64_t i = 0; i < size; ++i) squares += x[i] * x[i];        \
    const T scale = T(1) / std::sqrt(squares / T(size) + eps);                                                   \
    _Pragma("omp simd") for (int64_t i = 0; i < size; ++i) out[i] = weight[i] * (x[i] * scale);                  \
  }                                                                                                              \
  SHIPS_CLONES void rope_token(const T* x, const T* cos, const T* sin, int64_t heads, int64_t half, T* out) {    \
    for (int64_t h = 0; h < heads; ++h, x += 2 * half, out += 2 * half) {                                        \
      _Pragma("omp simd") for (int64_t i = 0; i < half; ++i) {                                                   \
        const T low = x[i], high = x[i + half];                                                                  \
        out[i] = low * cos[i] - high * sin[i];                                                                   \
        out[i + half] = high * cos[i + half] + low * sin[i + half];                                              \
      }                                                                                                          \
    }                                                                                                            \
  }                                                                                                              \
  SHIPS_CLONES void silu_mul_row(const T* gate, const T* up, int64_t size, T* out) {                             \
    _Pragma("omp simd") for (int64_t i = 0; i < size; ++i) out[i] = gate[i] / (T(1) + exp_of(-gate[i])) * up[i]; \
  }

SHIPS_DEFINE(float)
SHIPS_DEFINE(double)
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

void rms_norm(const Tensor& x, const Tensor& weight, double eps, Tensor out) {
  const int64_t size = weight.numel();
  require(x.is_contiguous() && out.is_contiguous() && weight.is_contiguous(), "rms_norm", "contiguous tensors");
  require(same_real_type(x, weight) && same_real_type(x, out), "rms_norm", "one dtype, float32 or float64, at aligned addresses");
  require(x.dim() > 0 && x.size(x.dim() - 1) == size && out.numel() == x.numel(), "rms_norm",
          "x and out [..., D] and weight [D]");
  if (x.numel() == 0) return;
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(x.const_data_ptr());
    const T* scale = static_cast<const T*>(weight.const_data_ptr());
    T* to = static_cast<T*>(out.mutable_data_ptr());
    over_rows(x.numel() / size, size, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) norm_row(from + r * size, scale, T(eps), size, to + r * size);
    });
  });
}

void rope(const Tensor& x, const Tensor& cos, const Tensor& sin, Tensor out) {
  require(cos.is_contiguous() && sin.is_contiguous() && out.is_contiguous(), "rope", "contiguous cos, sin and out");
  require(same_real_type(x, cos) && same_real_type(x, sin) && same_real_type(x, out), "rope",
          "one dtype, float32 or float64, at aligned addresses");
  require(x.dim() == 4 && cos.dim() == 2 && sin.dim() == 2 && x.size(1) == cos.size(0) && x.size(3) == cos.size(1) &&
              sin.size(0) == cos.size(0) && sin.size(1) == cos.size(1) && x.size(3) % 2 == 0,
          "rope", "x [B, T, H, D] with D even, cos and sin [T, D]");
  bool same_shape = out.dim() == 4;
  for (int64_t i = 0; same_shape && i < 4; ++i) same_shape = out.size(i) == x.size(i);
  require(same_shape, "rope", "out of the shape of x");
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
    over_rows(x.size(0) * tokens, heads * size, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const int64_t b = r / tokens, t = r % tokens;
        const T* token = from + b * row_step + t * token_step;
        rope_token(token, c + t * size, s + t * size, heads, size / 2, to + r * heads * size);
      }
    });
  });
}

void silu_mul(const Tensor& gate_up, Tensor out) {
  require(gate_up.is_contiguous() && out.is_contiguous(), "silu_mul", "contiguous tensors");
  require(same_real_type(gate_up, out) && gate_up.dim() == 2 && out.dim() == 2 && gate_up.size(0) == out.size(0) &&
              gate_up.size(1) == 2 * out.size(1),
          "silu_mul", "gate_up [N, 2 M] and out [N, M] of one dtype, at aligned addresses");
  if (out.numel() == 0) return;
  const int64_t size = out.size(1);
  dispatch(out, [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(gate_up.const_data_ptr());
    T* to = static_cast<T*>(out.mutable_data_ptr());
    over_rows(out.size(0), size, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const T* row = from + 2 * r * size;
        silu_mul_row(row, row + size, size, to + r * size);
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(shipsfast, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps, Tensor(a!) out) -> ()");
  m.def("rope(Tensor x, Tensor cos, Tensor sin, Tensor(a!) out) -> ()");
  m.def("silu_mul(Tensor gate_up, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(shipsfast, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rope", TORCH_BOX(&rope));
  m.impl("silu_mul", TORCH_BOX(&silu_mul));
}
