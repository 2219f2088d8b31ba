// KL(base || ablated) per row of logits, on CUDA, with one read of the logits from memory. No torch in here.
//
// Formula. With weights w ~ p_b, d = (x_a - x_b) - center and any center near log(sum e_a / sum e_b),
//
//     KL = E - (g - log1p(g)),  E = sum w (exp(d) - 1 - d) / sum w,  g = E + sum w d / sum w
//
// E has no negative term and x_a - x_b no rounding, so that a small KL keeps its digits; what is taken from E is
// about half the square of what center is off. So one pass does, with center a mean of x_a - x_b over the largest
// base logits, and no log sum of exps is needed before it. The vocabulary is cut into parts, each with its own
// center, and kl_of_parts puts them together by the chain rule of KL. Where a part's E is more than kLargestLoss
// times its KL, or a distance or logit is out of float32's range (masks, NaN), the part is done again in float64, by
// ships_divergence.h. Logits in float64 always go that way.
//
// Error. A relative error in a weight changes KL by at most as much, since KL is the minimum of E over all centers,
// so exp_f32's 1.2e-7 will do; the terms are good to 2e-7 and are summed by fours in float32, then in float64. The
// result is off by at most 1e-6 of the KL and 1e-18 nats (tests/kernels/test_csrc_nvcc.py; float64 logits: 1e-12 of
// the KL). Equal rows give exactly 0. A row's bits depend on nothing but its two rows of logits: not on alignment, nor
// on the rows beside it. For that the functions of ships_kl_terms.cuh spell out each operation.
//
// Speed. A float32 logit takes 27 instructions in the loop of a full group, and 30 in all, where pairs of floats took
// 151. Issued at 1.7 GHz on an H100's 132 multiprocessors that is 3.8 TB/s, 114 % of its memory's 3.35 TB/s [calc];
// in half precision 55 %. Not measured. Details are in docs/kernels.md.
//
// Layout. kl_order_kernel sorts the rows by base row. kl_parts_kernel: one block per part of kRowsAtOnce rows in that
// order, so that a base row is read from memory once and then found in L2, and its exps are shared by the rows.
// kl_rows_kernel: one warp per ablated row. Of size [., V] nothing is kept.
#pragma once

#include "ships_block.cuh"
#include "ships_kl.h"
#include "ships_kl_terms.cuh"

namespace shipsfast {

constexpr int kKlThreads = 128;
constexpr int kKlWarps = kKlThreads / 32;
constexpr int kSamples = kKlThreads / 16;  // of base logits, for center
constexpr int kKlPart = 8192;              // logits of a part
constexpr int kRowsAtOnce = 4;             // ablated rows that share one pass over their base row
constexpr int kTerms = 4;                  // summed in float32
constexpr int kOrderThreads = 128;

// Blocks to a multiprocessor, for which the registers must do
template <typename T>
constexpr int kKlBlocks = sizeof(T) == 2 ? 4 : 5;

inline int64_t kl_parts(int64_t vocab) { return (vocab + kKlPart - 1) / kKlPart; }

// `count` consecutive elements, by 16 bytes where they are aligned.
template <bool aligned, int count, typename U>
__device__ __forceinline__ void load_run(const U* source, U* target) {
  if constexpr (aligned) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(count * sizeof(U) / 16); ++i) {
      const uint4 loaded = reinterpret_cast<const uint4*>(source)[i];
      memcpy(target + 16 / sizeof(U) * i, &loaded, sizeof loaded);  // a cast would break the rules of aliasing
    }
  } else {
#pragma unroll
    for (int i = 0; i < count; ++i) target[i] = source[i];
  }
}

// grid [P + 1]: order [N], the rows of base row 0 first, those out of range last
__global__ void __launch_bounds__(kOrderThreads)
    kl_order_kernel(const int64_t* __restrict__ row_map,  // [N]
                    int64_t num_ablated, int64_t num_base, int32_t* __restrict__ order /* [N] */) {
  __shared__ RowCounts counts[kOrderThreads];
  counts[threadIdx.x] = count_rows(row_map, num_ablated, num_base, blockIdx.x, threadIdx.x, kOrderThreads);
  __syncthreads();
  const int at = first_place(counts, threadIdx.x, kOrderThreads);
  place_rows(row_map, num_ablated, num_base, blockIdx.x, threadIdx.x, kOrderThreads, at, order);
}

struct KlScratch {
  double sums[2 * kRowsAtOnce + 1][kKlThreads];  // of each thread: excess and mean of each row, the weights
  double totals[2 * kRowsAtOnce + 1];
  double block[kKlWarps];
  float largest[kSamples];  // of each half warp's base logits, and where
  int at[kSamples];
  int64_t row[kRowsAtOnce];  // the ablated rows at hand
  float center[kRowsAtOnce];
  bool exact[kRowsAtOnce];  // left to float64
};

// A part of one base row, and of the ablated rows in scratch
template <typename T>
struct KlGroup {
  const T* x_b;
  const T* ablated;  // of ablated row 0
  int64_t ablated_stride;
  int count;
  KlPart* parts;  // of ablated row 0
  int num_parts;

  __device__ const T* x_a(int64_t row) const { return ablated + row * ablated_stride; }
  __device__ KlPart* part(int64_t row) const { return parts + row * num_parts; }
};

// The largest base logit of each half warp, and where it is first; -inf where there is none.
template <bool aligned, typename T>
__device__ __forceinline__ void find_largest(const T* x_b, int count, KlScratch& scratch) {
  constexpr int kRun = 16 / sizeof(T);
  float largest = -HUGE_VALF;
  int at = 0;
  const int whole = count / kRun * kRun;
  for (int v = threadIdx.x * kRun; v < whole; v += kKlThreads * kRun) {
    alignas(16) T run[kRun];
    load_run<aligned, kRun>(x_b + v, run);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const float x = to_float(run[i]);
      at = x > largest ? v + i : at;
      largest = fmaxf(largest, x);
    }
  }
  if (const int v = whole + threadIdx.x; v < count && to_float(x_b[v]) > largest) {
    largest = to_float(x_b[v]);
    at = v;
  }
  for (int offset = 8; offset > 0; offset /= 2) {
    const float other = __shfl_down_sync(0xffffffffu, largest, offset);
    const int other_at = __shfl_down_sync(0xffffffffu, at, offset);
    at = other > largest || (other == largest && other_at < at) ? other_at : at;
    largest = fmaxf(largest, other);
  }
  if (threadIdx.x % 16 == 0) {
    scratch.largest[threadIdx.x / 16] = largest;
    scratch.at[threadIdx.x / 16] = at;
  }
}

// The mean of x_a - x_b over the largest base logits, weighted by their exps.
template <typename T>
SHIPS_INLINE float center_of(const T* x_a, const T* x_b, ExpPivot pivot, const KlScratch& scratch) {
  double weights = 0.0, sum = 0.0;
  for (int i = 0; i < kSamples; ++i) {
    if (scratch.largest[i] == -HUGE_VALF) continue;
    const int v = scratch.at[i];
    const double weight = exp_f32(scratch.largest[i], pivot);
    weights += weight;
    sum += weight * add(to_float(x_a[v]), -to_float(x_b[v]));
  }
  return static_cast<float>(sum / weights);
}

// Writes each thread's sums to scratch. Every operation is spelled out, so that `rows` changes no bit.
template <int rows, bool aligned, typename T>
__device__ __forceinline__ void sums_of_rows(const KlGroup<T>& group, ExpPivot pivot, KlScratch& scratch) {
  constexpr int kRun = 16 / sizeof(T);
  KlSums sums[rows];
  double weight_sum = 0.0;
  const T* x_b = group.x_b;
  const T* x_a[rows];
  float center[rows];
#pragma unroll
  for (int r = 0; r < rows; ++r) {
    x_a[r] = group.x_a(scratch.row[r]);
    center[r] = scratch.center[r];
  }
  const int count = group.count;
  const int whole = count / kRun * kRun;
  for (int v = threadIdx.x * kRun; v < whole; v += kKlThreads * kRun) {
    alignas(16) T run_b[kRun], run_a[rows][kRun];
    load_run<aligned, kRun>(x_b + v, run_b);
#pragma unroll
    for (int r = 0; r < rows; ++r) load_run<aligned, kRun>(x_a[r] + v, run_a[r]);
#pragma unroll
    for (int first = 0; first < kRun; first += kTerms) {
      float weights[kTerms], d[kTerms];
#pragma unroll
      for (int i = 0; i < kTerms; ++i) weights[i] = exp_f32(to_float(run_b[first + i]), pivot);
      add_weights(weight_sum, weights);
#pragma unroll
      for (int r = 0; r < rows; ++r) {
#pragma unroll
        for (int i = 0; i < kTerms; ++i) d[i] = distance(to_float(run_a[r][first + i]), to_float(run_b[first + i]), center[r]);
        add_run(sums[r], d, weights);
      }
    }
  }
  if (const int v = whole + threadIdx.x; v < count) {
    const float weights[1] = {exp_f32(to_float(x_b[v]), pivot)};
    add_weights(weight_sum, weights);
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      const float d[1] = {distance(to_float(x_a[r][v]), to_float(x_b[v]), center[r])};
      add_run(sums[r], d, weights);
    }
  }
#pragma unroll
  for (int r = 0; r < rows; ++r) {
    scratch.sums[2 * r][threadIdx.x] = sums[r].excess;
    scratch.sums[2 * r + 1][threadIdx.x] = sums[r].mean;
  }
  scratch.sums[2 * rows][threadIdx.x] = weight_sum;
}

template <bool aligned, typename T>
__device__ __forceinline__ void thread_sums(const KlGroup<T>& group, int taken, ExpPivot pivot, KlScratch& scratch) {
  if (taken == 4) sums_of_rows<4, aligned>(group, pivot, scratch);
  if (taken == 2) sums_of_rows<2, aligned>(group, pivot, scratch);
  if (taken == 1) sums_of_rows<1, aligned>(group, pivot, scratch);
}

// scratch.sums over the threads, into scratch.totals
__device__ __forceinline__ void add_threads(int sums, KlScratch& scratch) {
  for (int s = threadIdx.x / 32; s < sums; s += kKlWarps) {
    double sum = 0.0;
    for (int i = threadIdx.x % 32; i < kKlThreads; i += 32) sum += scratch.sums[s][i];
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(0xffffffffu, sum, offset);
    if (threadIdx.x % 32 == 0) scratch.totals[s] = sum;
  }
}

// A part in float64, for thread 0: three passes over it, for logits of any kind.
template <typename T>
__device__ __noinline__ KlPart exact_part(const T* x_a, const T* x_b, int count, double* shared /* [kKlWarps] */) {
  const RowNorm a = block_norm<kKlThreads>(x_a, count, shared);
  const RowNorm b = block_norm<kKlThreads>(x_b, count, shared);
  KlPart part = part_from_norms(a, b);
  if (!has_terms(part)) return part;
  const double shift = shift_of(a, b);
  for (int v = threadIdx.x; v < count; v += kKlThreads) {
    part.kl_nats += divergence_terms<false>(to_double(x_a[v]), to_double(x_b[v]), a, b, shift).kl;
  }
  part.kl_nats = block_sum<kKlThreads>(part.kl_nats, shared);
  return part;
}

// The part of the first `taken` rows in scratch, in float32 where that tells enough.
template <typename T>
__device__ __forceinline__ void group_parts(const KlGroup<T>& group, int taken, KlScratch& scratch) {
  bool exact = true;
  if constexpr (sizeof(T) < sizeof(double)) {
    bool aligned = reinterpret_cast<uintptr_t>(group.x_b) % 16 == 0;
    for (int r = 0; r < taken; ++r) aligned &= reinterpret_cast<uintptr_t>(group.x_a(scratch.row[r])) % 16 == 0;
    if (aligned) find_largest<true>(group.x_b, group.count, scratch);
    else find_largest<false>(group.x_b, group.count, scratch);
    __syncthreads();
    float largest = scratch.largest[0];
    for (int i = 1; i < kSamples; ++i) largest = fmaxf(largest, scratch.largest[i]);
    const ExpPivot pivot = exp_pivot(largest);
    if (threadIdx.x < taken) {
      const T* x_a = group.x_a(scratch.row[threadIdx.x]);
      scratch.center[threadIdx.x] = center_of(x_a, group.x_b, pivot, scratch);
    }
    __syncthreads();
    if (aligned) thread_sums<true>(group, taken, pivot, scratch);
    else thread_sums<false>(group, taken, pivot, scratch);
    __syncthreads();
    add_threads(2 * taken + 1, scratch);
    __syncthreads();
    if (threadIdx.x < taken) {
      const int r = threadIdx.x;
      const KlSums sums{scratch.totals[2 * r], scratch.totals[2 * r + 1]};
      KlPart* part = group.part(scratch.row[r]);
      exact = !part_from_sums(scratch.totals[2 * taken], sums, largest, scratch.center[r], *part);
    }
  }
  if (threadIdx.x < taken) scratch.exact[threadIdx.x] = exact;
  __syncthreads();
  for (int r = 0; r < taken; ++r) {
    if (!scratch.exact[r]) continue;
    const KlPart part = exact_part(group.x_a(scratch.row[r]), group.x_b, group.count, scratch.block);
    if (threadIdx.x == 0) *group.part(scratch.row[r]) = part;
  }
}

// grid [ceil(N / rows at once) * parts], parts fastest: neighbours read the same base row
template <typename T>
__global__ void __launch_bounds__(kKlThreads, kKlBlocks<T>)
    kl_parts_kernel(const T* __restrict__ base,  // [P, V]
                    int64_t base_stride,
                    const T* __restrict__ ablated,  // [N, V]
                    int64_t ablated_stride,
                    const int64_t* __restrict__ row_map,  // [N]
                    int64_t num_base, int64_t num_ablated, int64_t vocab, int num_parts,
                    const int32_t* __restrict__ order,  // [N]
                    KlPart* __restrict__ parts /* [N, num_parts] */) {
  __shared__ KlScratch scratch;
  const int64_t tile = blockIdx.x / num_parts, part = blockIdx.x % num_parts;
  const int64_t begin = part * kKlPart;
  const int count = static_cast<int>(min(vocab - begin, int64_t{kKlPart}));
  const int64_t end = min((tile + 1) * kRowsAtOnce, num_ablated);
  int taken;
  for (int64_t at = tile * kRowsAtOnce; at < end; at += taken) {
    const int64_t p = base_of(row_map[order[at]], num_base);
    if (p == num_base) return;  // and so are all that follow
    taken = 1;  // then 2, then 4, while they share the base row
    while (2 * taken <= kRowsAtOnce && at + 2 * taken <= end && row_map[order[at + 2 * taken - 1]] == p) taken *= 2;
    __syncthreads();  // scratch is free again
    if (threadIdx.x < taken) scratch.row[threadIdx.x] = order[at + threadIdx.x];
    __syncthreads();
    const T* x_b = base + p * base_stride + begin;
    group_parts(KlGroup<T>{x_b, ablated + begin, ablated_stride, count, parts + part, num_parts}, taken, scratch);
  }
}

// grid [ceil(N / kKlWarps)], a warp for each ablated row
__global__ void __launch_bounds__(kKlThreads)
    kl_rows_kernel(const KlPart* __restrict__ parts,  // [N, num_parts]
                   int num_parts,
                   const int64_t* __restrict__ row_map,  // [N]
                   int64_t num_base, int64_t num_ablated, double* __restrict__ kl_nats /* [N] */) {
  const int64_t i = int64_t{blockIdx.x} * kKlWarps + threadIdx.x / 32;
  if (i >= num_ablated) return;
  const int lane = threadIdx.x % 32;
  if (base_of(row_map[i], num_base) == num_base) {
    if (lane == 0) kl_nats[i] = NAN;
    return;
  }
  const auto largest = [](double x) {
    for (int offset = 16; offset > 0; offset /= 2) x = fmax(x, __shfl_xor_sync(0xffffffffu, x, offset));
    return x;
  };
  const auto total = [](double x) {
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
  };
  const double kl = kl_of_parts(parts + i * num_parts, num_parts, lane, 32, largest, total);
  if (lane == 0) kl_nats[i] = kl;
}

#ifdef __CUDACC__  // tests/support/kl_on_threads.cpp launches them otherwise
template <typename T>
void launch_kl_rows(const KlRows& rows, int32_t* order, KlPart* parts, cudaStream_t stream) {
  const int num_parts = static_cast<int>(kl_parts(rows.vocab));
  const int64_t tiles = (rows.num_ablated + kRowsAtOnce - 1) / kRowsAtOnce;
  kl_order_kernel<<<static_cast<unsigned>(rows.num_base + 1), kOrderThreads, 0, stream>>>(
      rows.row_map, rows.num_ablated, rows.num_base, order);
  kl_parts_kernel<T><<<static_cast<unsigned>(tiles * num_parts), kKlThreads, 0, stream>>>(
      static_cast<const T*>(rows.base), rows.base_stride, static_cast<const T*>(rows.ablated), rows.ablated_stride,
      rows.row_map, rows.num_base, rows.num_ablated, rows.vocab, num_parts, order, parts);
  kl_rows_kernel<<<static_cast<unsigned>((rows.num_ablated + kKlWarps - 1) / kKlWarps), kKlThreads, 0, stream>>>(
      parts, num_parts, rows.row_map, rows.num_base, rows.num_ablated, rows.kl_nats);
}
#endif

}  // namespace shipsfast
