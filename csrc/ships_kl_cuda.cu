// The CUDA side of the ops over rows of logits: scratch from torch's allocator, torch's current stream, launch
// check. The caller holds the device guard. Through the stable ABI, like bindings.cpp.

#include <limits>
#include <stdexcept>
#include <string>

#include <cuda_runtime.h>

#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "ships_divergence.cuh"
#include "ships_kl.cuh"

namespace shipsfast {
namespace {

torch::stable::Tensor device_bytes(int64_t bytes, int32_t device_index) {
  return torch::stable::empty(
      {bytes}, torch::headeronly::ScalarType::Byte, std::nullopt,
      torch::stable::Device(torch::headeronly::DeviceType::CUDA, device_index));
}

// torch's current stream, once the launch is known to fit.
cudaStream_t stream_for(const LogitRows& rows, int32_t device_index) {
  constexpr int64_t kLargestGrid = std::numeric_limits<int32_t>::max();
  if (rows.num_base >= kLargestGrid || rows.num_ablated > kLargestGrid) {
    throw std::runtime_error("shipsfast: base [" + std::to_string(rows.num_base) + ", V] or ablated [" +
                             std::to_string(rows.num_ablated) + ", V] has more rows than a CUDA grid");
  }
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace

void kl_rows_cuda(const KlRows& rows, int32_t device_index) {
  const cudaStream_t stream = stream_for(rows, device_index);
  // Freed on return while the kernels still run: torch reuses the memory on this stream only, after them.
  const auto order = device_bytes(rows.num_ablated * static_cast<int64_t>(sizeof(int32_t)), device_index);
  const auto parts = device_bytes(
      rows.num_ablated * kl_parts(rows.vocab) * static_cast<int64_t>(sizeof(KlPart)), device_index);
  with_logit_type<__nv_bfloat16, __half>(rows.type, [&](auto logit) {
    launch_kl_rows<decltype(logit)>(rows, static_cast<int32_t*>(order.mutable_data_ptr()),
                                    static_cast<KlPart*>(parts.mutable_data_ptr()), stream);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void divergence_rows_cuda(const DivergenceRows& rows, int32_t device_index) {
  const cudaStream_t stream = stream_for(rows, device_index);
  const auto scratch = device_bytes(rows.num_base * static_cast<int64_t>(sizeof(RowNorm)), device_index);
  RowNorm* norms = static_cast<RowNorm*>(scratch.mutable_data_ptr());
  with_logit_type<__nv_bfloat16, __half>(
      rows.type, [&](auto logit) { launch_divergence_rows<decltype(logit)>(rows, norms, stream); });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace shipsfast
