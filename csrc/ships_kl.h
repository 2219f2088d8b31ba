// What the implementations of the ops over rows of logits share: raw pointers and sizes, no torch.
#pragma once

#include <cstdint>

namespace shipsfast {

enum class LogitType : int32_t { kBFloat16, kFloat16, kFloat32, kFloat64 };

// run(x) with an x of the type of the logits.
template <typename BF16, typename F16, typename Run>
void with_logit_type(LogitType type, const Run& run) {
  switch (type) {
    case LogitType::kBFloat16: return run(BF16{});
    case LogitType::kFloat16: return run(F16{});
    case LogitType::kFloat32: return run(float{});
    case LogitType::kFloat64: return run(double{});
  }
}

// Strides are in elements, and the last dimension is contiguous.
struct LogitRows {
  const void* base;        // [P, V]
  const void* ablated;     // [N, V]
  const int64_t* row_map;  // [N], the base row of each ablated row
  LogitType type;
  int64_t num_base;     // P
  int64_t num_ablated;  // N
  int64_t vocab;        // V
  int64_t base_stride;
  int64_t ablated_stride;
};

// KL(base || ablated) of each ablated row.
struct KlRows : LogitRows {
  double* kl_nats;  // [N]
};

// Host memory. row_map has been checked against num_base. Throws std::runtime_error for a bad SHIPSFAST_CPU_ISA.
void kl_rows_cpu(const KlRows& rows);

// Device memory, on that device's current stream. A row whose row_map is out of range gets NaN: checking
// on the host would make it wait for the device.
void kl_rows_cuda(const KlRows& rows, int32_t device_index);

}  // namespace shipsfast
