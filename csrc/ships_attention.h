// What the attention kernels for CPUs share: how they look at tensors, and what they refuse.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include <torch/csrc/stable/tensor.h>

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
  return (tensor.size(tensor.dim() - 1) == 1 || tensor.stride(tensor.dim() - 1) == 1) &&
         reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % tensor.element_size() == 0;
}

void require(const char* op, bool condition, const char* expected) {
  if (!condition) throw std::runtime_error(std::string("shipsfast::") + op + ": expected " + expected);
}

}  // namespace
}  // namespace shipsfast
