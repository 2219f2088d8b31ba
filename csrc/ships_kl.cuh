// KL(base || ablated) per row of logits, on CUDA, with one read of the ablated logits. No torch in here.
//
// The formula is that of ships_kl_cpu.cpp: with z = x_b - max(x_b), t = x_a - x_a[argmax x_b], e = exp(.),
//
//     KL = log(sum e_a / sum e_b) - sum e_b (t - z) / sum e_b
//
// with log1p(sum (e_a - e_b) / sum e_b) for the first term where the sums are close.
//
// Arithmetic. Data-centre GPUs run float64 at half the rate of float32, others at 1/64, where one float64 exp
// an element would be tens of times slower than the memory. Plain float32 exps would leave errors near 1e-7,
// which is what small scores are made of. So everything per element is done in pairs of floats
// (ships_two_float.cuh), in some hundred float32 instructions; only the 512 partial sums of a row meet in float64.
// The error is a few 1e-14 of the sums, instead of 1e-16 on the CPU. The functions are also host functions, so
// that their accuracy is tested without a GPU (tests/support/kl_driver.cu).
//
// Layout. kl_base_kernel: one block per base row, writes e_b [P, pitch] and each row's argmax and sum.
// kl_rows_kernel: one block per ablated row. Loads are 16 bytes wide from the first aligned element of the
// ablated row on; base logits and e_b are read as wide where their alignment allows it. Nothing of size
// [N, V] is kept.
#pragma once

#include <cfloat>
#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math_constants.h>

#include "ships_kl.h"
#include "ships_two_float.cuh"

namespace shipsfast {

constexpr int kKlThreads = 512;
constexpr int kKlWarps = kKlThreads / 32;
constexpr double kLargestPairSum = 1e30;  // a sum above this may have met kHighestExponent

SHIPS_HD double to_double(double x) { return x; }
SHIPS_HD float to_float(float x) { return x; }
SHIPS_HD float to_float(__half x) { return __half2float(x); }
SHIPS_HD float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
template <typename T>
SHIPS_HD double to_double(T x) {
  return to_float(x);
}

// x - pivot: exact in pairs for up to 32 bits, rounded to a pair for float64
template <typename T>
SHIPS_HD TwoFloat distance(T x, T pivot) {
  return two_sum(to_float(x), -to_float(pivot));
}
template <>
SHIPS_HD TwoFloat distance(double x, double pivot) {
  const double d = x - pivot;
  const float hi = static_cast<float>(d);
  return {hi, isinf(hi) ? 0.0f : static_cast<float>(d - hi)};
}

struct RowSums {
  TwoFloat exps{0.0f, 0.0f};        // sum e_a
  TwoFloat difference{0.0f, 0.0f};  // sum (e_a - e_b)
  TwoFloat weighted{0.0f, 0.0f};    // sum e_b (t - z)
  bool unbounded = false;           // an ablated -inf where e_b > 0
};

template <typename T>
SHIPS_HD void add_logit(RowSums& sums, T x_a, T x_b, TwoFloat e_b, T pivot_a, T pivot_b, const TwoFloat* exp2_table) {
  TwoFloat t = distance(x_a, pivot_a);
  TwoFloat z = distance(x_b, pivot_b);
  if (t.hi < -FLT_MAX) {
    sums.unbounded |= e_b.hi > 0.0f;
    t = {kLowestExponent, 0.0f};
  }
  if (e_b.hi == 0.0f) z = {kLowestExponent, 0.0f};  // x_b is -inf, and pairs cannot compute with it
  const TwoFloat e_a = exp_pair(t, exp2_table);
  sums.exps = plus(sums.exps, e_a);
  sums.difference = plus(sums.difference, plus(e_a, negative(e_b)));
  sums.weighted = plus(sums.weighted, times(e_b, plus(t, negative(z))));
}

SHIPS_HD double kl_from_sums(double exps, double difference, double weighted, double base_exps) {
  const double log_ratio =
      fabs(difference) < 0.5 * base_exps ? log1p(difference / base_exps) : log(exps / base_exps);
  const double kl = log_ratio - weighted / base_exps;
  return kl < 0.0 ? 0.0 : kl;  // KL >= 0: what is below is rounding
}

struct BaseStats {
  double exps;     // sum e_b
  int64_t argmax;  // -1 for a row with NaN, +inf, or nothing but -inf
};

// `count` consecutive elements, by 16 bytes where they are aligned. All threads of a block take the same way.
template <int count, typename U>
__device__ __forceinline__ void load_run(const U* source, U* target) {
  if (reinterpret_cast<uintptr_t>(source) % 16 == 0) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(count * sizeof(U) / 16); ++i) {
      reinterpret_cast<uint4*>(target)[i] = reinterpret_cast<const uint4*>(source)[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < count; ++i) target[i] = source[i];
  }
}

// The sum over the block, for thread 0; always in the same order.
__device__ __forceinline__ double block_sum(double value, double* shared /* [kKlWarps] */) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  __syncthreads();  // shared may still be in use by the sum before
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x >= 32) return 0.0;
  value = threadIdx.x < kKlWarps ? shared[threadIdx.x] : 0.0;
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  return value;
}

// The first position of the largest logit, for all threads; -1 if that is not finite or there is a NaN.
template <typename T>
__device__ int64_t block_argmax(const T* x, int64_t vocab, double* shared, int64_t* shared_at) {
  double largest = -CUDART_INF;
  int64_t at = -1;
  bool has_nan = false;
  for (int64_t v = threadIdx.x; v < vocab; v += kKlThreads) {
    const double value = to_double(x[v]);
    has_nan |= isnan(value);
    if (value > largest) {
      largest = value;
      at = v;
    }
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    const double other = __shfl_down_sync(0xffffffffu, largest, offset);
    const int64_t other_at = __shfl_down_sync(0xffffffffu, at, offset);
    if (other > largest || (other == largest && other_at < at)) {
      largest = other;
      at = other_at;
    }
  }
  has_nan = __syncthreads_or(has_nan);
  if (threadIdx.x % 32 == 0) {
    shared[threadIdx.x / 32] = largest;
    shared_at[threadIdx.x / 32] = at;
  }
  __syncthreads();
  largest = shared[0];
  at = shared_at[0];
  for (int warp = 1; warp < kKlWarps; ++warp) {
    if (shared[warp] > largest || (shared[warp] == largest && shared_at[warp] < at)) {
      largest = shared[warp];
      at = shared_at[warp];
    }
  }
  return has_nan || isinf(largest) ? -1 : at;
}

// grid [P]
template <typename T>
__global__ void __launch_bounds__(kKlThreads, 1)
    kl_base_kernel(const T* __restrict__ base,  // [P, V]
                   int64_t base_stride, int64_t vocab,
                   TwoFloat* __restrict__ e_b,  // [P, pitch]
                   int64_t pitch, BaseStats* __restrict__ stats /* [P] */) {
  __shared__ double shared[kKlWarps];
  __shared__ int64_t shared_at[kKlWarps];
  __shared__ TwoFloat exp2_table[32];
  if (threadIdx.x < 32) exp2_table[threadIdx.x] = kExp2Device[threadIdx.x];
  const int64_t p = blockIdx.x;
  const T* x = base + p * base_stride;  // [V]
  const int64_t at = block_argmax(x, vocab, shared, shared_at);
  if (at < 0) {
    if (threadIdx.x == 0) stats[p] = {0.0, -1};
    return;
  }
  const T pivot = x[at];
  TwoFloat sum = {0.0f, 0.0f};
  for (int64_t v = threadIdx.x; v < vocab; v += kKlThreads) {
    const TwoFloat z = distance(x[v], pivot);
    const TwoFloat e = z.hi < -FLT_MAX ? TwoFloat{0.0f, 0.0f} : exp_pair(z, exp2_table);
    e_b[p * pitch + v] = e;
    sum = plus(sum, e);
  }
  const double exps = block_sum(static_cast<double>(sum.hi) + sum.lo, shared);
  if (threadIdx.x == 0) stats[p] = {exps, at};
}

template <typename T>
__device__ __forceinline__ RowSums thread_sums(const T* x_a, const T* x_b, const TwoFloat* e_b, int64_t vocab,
                                               T pivot_a, T pivot_b, const TwoFloat* exp2_table) {
  constexpr int kRun = 16 / sizeof(T);
  RowSums sums;
  const int64_t misaligned = reinterpret_cast<uintptr_t>(x_a) % 16 / sizeof(T);
  const int64_t head = misaligned == 0 ? 0 : min(kRun - misaligned, vocab);
  const int64_t tail = head + (vocab - head) / kRun * kRun;
  for (int64_t v = head + threadIdx.x * kRun; v < tail; v += kKlThreads * kRun) {
    alignas(16) T run_a[kRun], run_b[kRun];
    load_run<kRun>(x_a + v, run_a);
    load_run<kRun>(x_b + v, run_b);
#pragma unroll
    for (int i = 0; i < kRun; i += 2) {
      alignas(16) TwoFloat pair_e[2];
      load_run<2>(e_b + v + i, pair_e);
      add_logit(sums, run_a[i], run_b[i], pair_e[0], pivot_a, pivot_b, exp2_table);
      add_logit(sums, run_a[i + 1], run_b[i + 1], pair_e[1], pivot_a, pivot_b, exp2_table);
    }
  }
  // What is left on both sides is less than a run each.
  const int64_t v = threadIdx.x < head ? threadIdx.x : tail + threadIdx.x - head;
  if (v < vocab) add_logit(sums, x_a[v], x_b[v], e_b[v], pivot_a, pivot_b, exp2_table);
  return sums;
}

// grid [N]
template <typename T>
__global__ void __launch_bounds__(kKlThreads, 1)
    kl_rows_kernel(const T* __restrict__ base,  // [P, V]
                   int64_t base_stride,
                   const T* __restrict__ ablated,  // [N, V]
                   int64_t ablated_stride,
                   const int64_t* __restrict__ row_map,  // [N]
                   int64_t num_base, int64_t vocab,
                   const TwoFloat* __restrict__ e_b,  // [P, pitch]
                   int64_t pitch,
                   const BaseStats* __restrict__ stats,  // [P]
                   double* __restrict__ kl_nats /* [N] */) {
  __shared__ double shared[kKlWarps];
  __shared__ int64_t shared_at[kKlWarps];
  __shared__ TwoFloat exp2_table[32];
  __shared__ bool again;
  if (threadIdx.x < 32) exp2_table[threadIdx.x] = kExp2Device[threadIdx.x];
  const int64_t i = blockIdx.x;
  const int64_t p = row_map[i];
  if (p < 0 || p >= num_base || stats[p].argmax < 0) {
    if (threadIdx.x == 0) kl_nats[i] = CUDART_NAN;
    return;
  }
  const T* x_a = ablated + i * ablated_stride;  // [V]
  const T* x_b = base + p * base_stride;        // [V]
  const double base_exps = stats[p].exps;
  const T pivot_b = x_b[stats[p].argmax];
  T pivot_a = x_a[stats[p].argmax];
  __syncthreads();  // exp2_table
  // The second time, if there is one, takes the row's true maximum as pivot.
  for (int attempt = 0; attempt < 2; ++attempt) {
    if (attempt == 1) {
      const int64_t at = block_argmax(x_a, vocab, shared, shared_at);
      if (at < 0) {
        if (threadIdx.x == 0) kl_nats[i] = CUDART_NAN;
        return;
      }
      pivot_a = x_a[at];
    }
    const RowSums sums = thread_sums(x_a, x_b, e_b + p * pitch, vocab, pivot_a, pivot_b, exp2_table);
    const double exps = block_sum(static_cast<double>(sums.exps.hi) + sums.exps.lo, shared);
    const double difference = block_sum(static_cast<double>(sums.difference.hi) + sums.difference.lo, shared);
    const double weighted = block_sum(static_cast<double>(sums.weighted.hi) + sums.weighted.lo, shared);
    const bool unbounded = __syncthreads_or(sums.unbounded);
    if (threadIdx.x == 0) {
      again = !(exps < kLargestPairSum);  // also NaN, and with an infinite pivot
      kl_nats[i] = unbounded ? CUDART_INF : kl_from_sums(exps, difference, weighted, base_exps);
    }
    __syncthreads();
    if (!again) return;
  }
}

// Row length of e_b: rows start at 16 bytes.
inline int64_t kl_pitch(int64_t vocab) { return (vocab + 1) / 2 * 2; }

template <typename T>
void launch_kl_rows(const KlRows& rows, TwoFloat* e_b, BaseStats* stats, cudaStream_t stream) {
  const T* base = static_cast<const T*>(rows.base);
  const T* ablated = static_cast<const T*>(rows.ablated);
  const int64_t pitch = kl_pitch(rows.vocab);
  if (rows.num_base > 0) {  // with none, every row_map is out of range
    kl_base_kernel<T><<<static_cast<unsigned>(rows.num_base), kKlThreads, 0, stream>>>(
        base, rows.base_stride, rows.vocab, e_b, pitch, stats);
  }
  kl_rows_kernel<T><<<static_cast<unsigned>(rows.num_ablated), kKlThreads, 0, stream>>>(
      base, rows.base_stride, ablated, rows.ablated_stride, rows.row_map, rows.num_base, rows.vocab, e_b, pitch,
      stats, rows.kl_nats);
}

}  // namespace shipsfast
