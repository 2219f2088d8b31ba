// Divergences per row of logits, on CUDA. The formulas are in ships_divergence.h; no torch in here.
//
// Arithmetic is float64 throughout, in the functions that the CPU runs too. On data-centre GPUs that is half the
// rate of float32; on others, at 1/64, a row of 128k tokens still costs some tens of microseconds, less than the
// forward pass that made it. For KL alone ships_kl.cuh is much the faster.
//
// Layout. norm_rows_kernel: one block per base row, writes its RowNorm. divergence_rows_kernel: one block per
// ablated row, which is read three times: its maximum, its sum of exps, its terms. The last two find it in L2
// where the rows in flight fit there. A thread takes every 512th element whatever the row's alignment, so that
// equal rows have equal sums of exps, bit by bit, and give exactly 0. Nothing of size [., V] is kept.
#pragma once

#include "ships_block.cuh"
#include "ships_divergence.h"

namespace shipsfast {

constexpr int kDivergenceThreads = 512;
constexpr int kDivergenceWarps = kDivergenceThreads / 32;

// grid [P]
template <typename T>
__global__ void __launch_bounds__(kDivergenceThreads, 1)
    norm_rows_kernel(const T* __restrict__ base,  // [P, V]
                     int64_t base_stride, int64_t vocab, RowNorm* __restrict__ norms /* [P] */) {
  __shared__ double shared[kDivergenceWarps];
  const int64_t p = blockIdx.x;
  const RowNorm norm = block_norm<kDivergenceThreads>(base + p * base_stride, vocab, shared);
  if (threadIdx.x == 0) norms[p] = norm;
}

// grid [N]
template <typename T, bool with_js>
__global__ void __launch_bounds__(kDivergenceThreads, 1)
    divergence_rows_kernel(const T* __restrict__ base,  // [P, V]
                           int64_t base_stride,
                           const T* __restrict__ ablated,  // [N, V]
                           int64_t ablated_stride,
                           const int64_t* __restrict__ row_map,  // [N]
                           int64_t num_base, int64_t vocab,
                           const RowNorm* __restrict__ norms,  // [P]
                           int64_t which, int64_t num_ablated, double* __restrict__ results /* [bits, N] */) {
  __shared__ double shared[kDivergenceWarps];
  const int64_t i = blockIdx.x;
  const int64_t p = row_map[i];
  const bool known = p >= 0 && p < num_base && !isnan(norms[p].log_sum);
  const T* x_a = ablated + i * ablated_stride;  // [V]
  const RowNorm a_norm = known ? block_norm<kDivergenceThreads>(x_a, vocab, shared) : RowNorm{0.0, NAN};
  if (isnan(a_norm.log_sum)) {
    if (threadIdx.x == 0) {
      const DivergenceSums none{NAN, NAN, NAN, NAN, NAN, NAN};
      store_divergences(none, which, results + i, num_ablated);
    }
    return;
  }
  const T* x_b = base + p * base_stride;  // [V]
  const RowNorm b_norm = norms[p];
  const double shift = (a_norm.largest - b_norm.largest) + (a_norm.log_sum - b_norm.log_sum);
  DivergenceSums sums;
  for (int64_t v = threadIdx.x; v < vocab; v += kDivergenceThreads) {
    sums += divergence_terms<with_js>(to_double(x_a[v]), to_double(x_b[v]), a_norm, b_norm, shift);
  }
  sums.kl = block_sum<kDivergenceThreads>(sums.kl, shared);
  sums.reverse_kl = block_sum<kDivergenceThreads>(sums.reverse_kl, shared);
  if constexpr (with_js) sums.js = block_sum<kDivergenceThreads>(sums.js, shared);
  sums.gained = block_sum<kDivergenceThreads>(sums.gained, shared);
  sums.lost = block_sum<kDivergenceThreads>(sums.lost, shared);
  sums.mass_up = block_sum<kDivergenceThreads>(sums.mass_up, shared);
  if (threadIdx.x == 0) store_divergences(sums, which, results + i, num_ablated);
}

template <typename T>
void launch_divergence_rows(const DivergenceRows& rows, RowNorm* norms, cudaStream_t stream) {
  const T* base = static_cast<const T*>(rows.base);
  const T* ablated = static_cast<const T*>(rows.ablated);
  if (rows.num_base > 0) {  // with none, every row_map is out of range
    norm_rows_kernel<T><<<static_cast<unsigned>(rows.num_base), kDivergenceThreads, 0, stream>>>(base, rows.base_stride,
                                                                                         rows.vocab, norms);
  }
  const auto kernel = rows.which & kJs ? divergence_rows_kernel<T, true> : divergence_rows_kernel<T, false>;
  kernel<<<static_cast<unsigned>(rows.num_ablated), kDivergenceThreads, 0, stream>>>(
      base, rows.base_stride, ablated, rows.ablated_stride, rows.row_map, rows.num_base, rows.vocab, norms,
      rows.which, rows.num_ablated, rows.results);
}

}  // namespace shipsfast
