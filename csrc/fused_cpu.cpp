// The element-wise operations between a decoder layer's matrix products, on the CPU, one pass each.
//
//   rms_norm(x, weight, eps, out)   out = weight * x / sqrt(mean(x^2) + eps), per row
//   rope_(x, cos, sin)              rotary embedding in place, rotate-half convention
//   silu_mul_(gate, up)             gate = gate * sigmoid(gate) * up in place
//
// In torch these are 5, 5 and 2 passes over memory with as many temporaries, which on a CPU costs a layer a
// third of its time. float32 and float64; one row is one thread's work, so results do not depend on threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SHIPS_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define SHIPS_CLONES
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kElementsPerTask = 1 << 14;  // less than this is not worth another thread

// exp for floats by exp(x) = 2^k exp(r), |r| <= ln2 / 2, to 1 ulp or so; branch-free, so that loops vectorise.
inline float exp_of(float x) {
  x = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
  const float k = std::floor(x * 1.44269504f + 0.5f);
  float r = x - k * 0.693359375f;
  r = r + k * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(k) + 127) << 23;
  float two_to_k;
  std::memcpy(&two_to_k, &bits, sizeof(float));
  return p * two_to_k;
}
inline double exp_of(double x) { return std::exp(x); }

#define SHIPS_DEFINE(T)                                                                                          \
  SHIPS_CLONES void norm_row(const T* x, const T* weight, T eps, int64_t size, T* out) {                         \
    T squares = 0;                                                                                               \
    _Pragma("omp simd reduction(+ : squares)") for (int64_t i = 0; i < size; ++i) squares += x[i] * x[i];        \
    const T scale = T(1) / std::sqrt(squares / T(size) + eps);                                                   \
    _Pragma("omp simd") for (int64_t i = 0; i < size; ++i) out[i] = weight[i] * (x[i] * scale);                  \
  }                                                                                                              \
  SHIPS_CLONES void rope_token(T* x, const T* cos, const T* sin, int64_t heads, int64_t half) {                  \
    for (int64_t h = 0; h < heads; ++h, x += 2 * half) {                                                         \
      _Pragma("omp simd") for (int64_t i = 0; i < half; ++i) {                                                   \
        const T low = x[i], high = x[i + half];                                                                  \
        x[i] = low * cos[i] - high * sin[i];                                                                     \
        x[i + half] = high * cos[i + half] + low * sin[i + half];                                                \
      }                                                                                                          \
    }                                                                                                            \
  }                                                                                                              \
  SHIPS_CLONES void silu_mul_run(T* gate, const T* up, int64_t size) {                                           \
    _Pragma("omp simd") for (int64_t i = 0; i < size; ++i) gate[i] = gate[i] / (T(1) + exp_of(-gate[i])) * up[i]; \
  }

SHIPS_DEFINE(float)
SHIPS_DEFINE(double)
#undef SHIPS_DEFINE

void require(bool condition, const char* op, const char* expected) {
  if (!condition) throw std::runtime_error(std::string("shipsfast::") + op + ": expected " + expected);
}

bool same_real_type(const Tensor& a, const Tensor& b) {
  return a.scalar_type() == b.scalar_type() &&
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
  require(same_real_type(x, weight) && same_real_type(x, out), "rms_norm", "one dtype, float32 or float64");
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

void rope_(Tensor x, const Tensor& cos, const Tensor& sin) {
  require(x.is_contiguous() && cos.is_contiguous() && sin.is_contiguous(), "rope_", "contiguous tensors");
  require(same_real_type(x, cos) && same_real_type(x, sin), "rope_", "one dtype, float32 or float64");
  require(x.dim() == 4 && cos.dim() == 2 && sin.dim() == 2 && x.size(1) == cos.size(0) && x.size(3) == cos.size(1) &&
              sin.size(0) == cos.size(0) && sin.size(1) == cos.size(1) && x.size(3) % 2 == 0,
          "rope_", "x [B, T, H, D] with D even, cos and sin [T, D]");
  if (x.numel() == 0) return;
  const int64_t tokens = x.size(1), heads = x.size(2), size = x.size(3);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    T* data = static_cast<T*>(x.mutable_data_ptr());
    const T* c = static_cast<const T*>(cos.const_data_ptr());
    const T* s = static_cast<const T*>(sin.const_data_ptr());
    over_rows(x.size(0) * tokens, heads * size, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const int64_t t = r % tokens;
        rope_token(data + r * heads * size, c + t * size, s + t * size, heads, size / 2);
      }
    });
  });
}

void silu_mul_(Tensor gate, const Tensor& up) {
  require(gate.is_contiguous() && up.is_contiguous(), "silu_mul_", "contiguous tensors");
  require(same_real_type(gate, up) && gate.numel() == up.numel(), "silu_mul_", "gate and up of one shape and dtype");
  if (gate.numel() == 0) return;
  dispatch(gate, [&](auto zero) {
    using T = decltype(zero);
    T* g = static_cast<T*>(gate.mutable_data_ptr());
    const T* u = static_cast<const T*>(up.const_data_ptr());
    over_rows(gate.numel(), 1, [&](int64_t begin, int64_t end) { silu_mul_run(g + begin, u + begin, end - begin); });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(shipsfast, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps, Tensor(a!) out) -> ()");
  m.def("rope_(Tensor(a!) x, Tensor cos, Tensor sin) -> ()");
  m.def("silu_mul_(Tensor(a!) gate, Tensor up) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(shipsfast, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rope_", TORCH_BOX(&rope_));
  m.impl("silu_mul_", TORCH_BOX(&silu_mul_));
}
