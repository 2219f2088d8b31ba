// What the attention kernels for CPUs share: how they look at tensors, and what they refuse.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "ships_half.h"

#define SHIPS_ALWAYS_INLINE inline __attribute__((always_inline))

namespace shipsfast {
namespace {

enum Replace : int8_t { kReplaceQ = 1, kReplaceK = 2, kReplaceOut = 4 };

// A tensor whose last dimension is contiguous; a dimension of size 1 stands for any size.
template <typename T>
struct View {
  const T* data;
  int64_t strides[3];
  const T* at(int64_t i, int64_t j, int64_t k) const { return data + i * strides[0] + j * strides[1] + k * strides[2]; }
};

// dims: which dimensions of the tensor i, j and k count, -1 for none.
template <typename T>
View<T> view(const torch::stable::Tensor& tensor, std::vector<int64_t> dims) {
  View<T> out{static_cast<const T*>(tensor.const_data_ptr()), {0, 0, 0}};
  for (size_t i = 0; i < dims.size(); ++i) {
    if (dims[i] >= 0 && tensor.size(dims[i]) > 1) out.strides[i] = tensor.stride(dims[i]);
  }
  return out;
}

// And at an address that the type allows.
bool contiguous_last(const torch::stable::Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return last >= 0 && (tensor.size(last) == 1 || tensor.stride(last) == 1) &&
         reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % tensor.element_size() == 0;
}

void require(const char* op, bool condition, const char* expected) {
  if (!condition) throw std::runtime_error(std::string("shipsfast::") + op + ": expected " + expected);
}

// What an attention is told of its heads: factors and replacements, [rows, H] each; empty tensors for none.
struct MaskTensors {
  const torch::stable::Tensor &logit_scale, &output_scale, &replace, &q_alt, &k_alt, &out_alt, &sink;
  double scaling, softcap;
};

// Raises unless they are for so many rows and heads. Shapes of the replacing vectors are the caller's to check.
inline void check_masks(const char* op, const MaskTensors& masks, torch::headeronly::ScalarType type, int64_t rows,
                 int64_t heads) {
  using torch::headeronly::ScalarType;
  const auto of = [](const torch::stable::Tensor& x, ScalarType wanted, int64_t count) {
    return x.scalar_type() == wanted && x.is_contiguous() && x.numel() == count;
  };
  for (const auto* x : {&masks.logit_scale, &masks.output_scale}) {
    require(op, of(*x, ScalarType::Double, rows * heads), "float64 scales [rows, H]");
  }
  require(op, masks.replace.numel() == 0 || of(masks.replace, ScalarType::Char, rows * heads), "int8 flags [rows, H]");
  require(op, masks.sink.numel() == 0 || of(masks.sink, ScalarType::Double, heads), "float64 sinks [H]");
  for (const auto* x : {&masks.q_alt, &masks.k_alt, &masks.out_alt}) {
    require(op, x->numel() == 0 || (x->scalar_type() == type && contiguous_last(*x)),
            "replacement vectors of the dtype of q, with contiguous heads");
  }
}

template <typename T>
struct Masks {
  const double* logit_scale;    // [rows, H]
  const double* output_scale;   // [rows, H]
  const int8_t* replace;        // [rows, H] or null
  const double* sink;           // [H], one more logit per head in the denominator, or null
  double scaling;
  T softcap;                    // 0: none

  explicit Masks(const MaskTensors& from)
      : logit_scale(static_cast<const double*>(from.logit_scale.const_data_ptr())),
        output_scale(static_cast<const double*>(from.output_scale.const_data_ptr())),
        replace(from.replace.numel() ? static_cast<const int8_t*>(from.replace.const_data_ptr()) : nullptr),
        sink(from.sink.numel() ? static_cast<const double*>(from.sink.const_data_ptr()) : nullptr),
        scaling(from.scaling), softcap(from.softcap) {}

  int8_t flags(int64_t at) const { return replace ? replace[at] : int8_t(0); }
  T sink_of(int64_t head) const { return sink ? T(sink[head]) : -std::numeric_limits<T>::infinity(); }
};

// out = from * factor
template <typename To, typename From, typename T>
SHIPS_ALWAYS_INLINE void scale_into(To* out, const From* from, int64_t size, T factor) {
  for (int64_t d = 0; d < size; ++d) round_to(out[d], widened(from[d]) * factor);
}

template <typename S>
SHIPS_ALWAYS_INLINE void clear(S* out, int64_t size) {
  std::memset(out, 0, size * sizeof(S));
}

// run(a number of that type) for the types that attention takes; sums are in float32, or float64 of float64.
template <typename F>
void with_storage(torch::headeronly::ScalarType type, const F& run) {
  using torch::headeronly::ScalarType;
  switch (type) {
    case ScalarType::Double: return run(double{});
    case ScalarType::BFloat16: return run(BFloat16{});
    case ScalarType::Half: return run(Float16{});
    default: return run(float{});
  }
}

bool is_storage(torch::headeronly::ScalarType type) {
  using torch::headeronly::ScalarType;
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

constexpr const char* kStorage = "float64, float32, bfloat16 or float16";

template <typename T>
SHIPS_ALWAYS_INLINE void cap(T* scores, int64_t begin, int64_t end, T softcap) {
  if (softcap == 0) return;
  for (int64_t j = begin; j < end; ++j) scores[j] = softcap * std::tanh(scores[j] / softcap);
}

template <typename T>
SHIPS_ALWAYS_INLINE T largest_of(const T* scores, int64_t begin, int64_t end, T top) {
#pragma omp simd reduction(max : top)
  for (int64_t j = begin; j < end; ++j) top = scores[j] > top ? scores[j] : top;
  return top;
}

}  // namespace
}  // namespace shipsfast
