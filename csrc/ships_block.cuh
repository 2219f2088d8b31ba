// What the CUDA kernels over rows of logits share: conversions, and reductions over a thread block.
#pragma once

#include <cmath>
#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "ships_divergence.h"

namespace shipsfast {

SHIPS_INLINE float to_float(float x) { return x; }
SHIPS_INLINE float to_float(__half x) { return __half2float(x); }
SHIPS_INLINE float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
SHIPS_INLINE double to_double(double x) { return x; }
template <typename T>
SHIPS_INLINE double to_double(T x) {
  return to_float(x);
}

// The sum over the block, for thread 0; always in the same order.
template <int threads>
__device__ __forceinline__ double block_sum(double value, double* shared /* [threads / 32] */) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  __syncthreads();  // shared may still be in use by the sum before
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x >= 32) return 0.0;
  value = threadIdx.x < threads / 32 ? shared[threadIdx.x] : 0.0;
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  return value;
}

// The largest logit, for all threads; NaN for a row with NaN or +inf.
template <int threads, typename T>
__device__ double block_max(const T* x, int64_t count, double* shared /* [threads / 32] */) {
  double largest = -HUGE_VAL;
  bool bad = false;
  for (int64_t v = threadIdx.x; v < count; v += threads) {
    const double value = to_double(x[v]);
    bad |= isnan(value);
    largest = value > largest ? value : largest;
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    const double other = __shfl_down_sync(0xffffffffu, largest, offset);
    largest = other > largest ? other : largest;
  }
  bad = __syncthreads_or(bad);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = largest;
  __syncthreads();
  for (int warp = 0; warp < threads / 32; ++warp) largest = shared[warp] > largest ? shared[warp] : largest;
  __syncthreads();  // shared is the caller's again
  return bad || largest == HUGE_VAL ? NAN : largest;
}

// log sum exp of a row, for all threads. largest is -inf for nothing but -inf, NaN for NaN or +inf; log_sum is NaN
// in both cases.
template <int threads, typename T>
__device__ RowNorm block_norm(const T* x, int64_t count, double* shared /* [threads / 32] */) {
  const double largest = block_max<threads>(x, count, shared);
  double exps = 0.0;
  for (int64_t v = threadIdx.x; v < count; v += threads) {
    exps += exp_f64(clamp_exponent(to_double(x[v]) - largest));
  }
  exps = block_sum<threads>(exps, shared);
  __syncthreads();
  if (threadIdx.x == 0) shared[0] = log(exps);
  __syncthreads();
  return {largest, shared[0]};
}

}  // namespace shipsfast
