// The arithmetic of ships_kl.cuh, on the device and the host alike, so that its accuracy is tested without a GPU
// (tests/support/kl_driver.cu). How the errors are bounded is told there too.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "ships_block.cuh"
#include "ships_divergence.h"

namespace shipsfast {

constexpr float kNearDistance = 1.0f;       // of excess(): the polynomial's range
constexpr float kFarthestDistance = 30.0f;  // beyond it a part is left to float64
constexpr float kDeepest = 83.0f;           // weights are at least exp(-83) of the largest: positive, yet nothing
constexpr float kLargestLogit = 1e5f;      // of the float32 route: n below must be far under 2^22
constexpr double kLargestLoss = 8.0;        // see part_from_sums

// The compiler may not contract these, nor choose by what stands beside them: bits do not depend on the code around.
SHIPS_INLINE float add(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

SHIPS_INLINE float multiply(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

SHIPS_INLINE float shifted_exponent(float x, float steps_in_low_bits) {
#ifdef __CUDA_ARCH__
  return __int_as_float(__float_as_int(x) + (__float_as_int(steps_in_low_bits) << 23));
#else
  uint32_t bits, steps;
  memcpy(&bits, &x, sizeof bits);
  memcpy(&steps, &steps_in_low_bits, sizeof steps);
  bits += steps << 23;
  memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

// The exps of a row are taken over 2^n, n next to its largest logit times log2(e). Unlike x - largest, that rounds
// nothing: exp(x) / 2^n = 2^(m - n) exp(r), x = m ln2 + r.
struct ExpPivot {
  float round;   // 1.5 * 2^23 - n: adding it leaves m - n in the low bits
  float lowest;  // exps of less are taken as its own
};

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23
constexpr float kLog2E = 0x1.715476p+0f;
constexpr ExpPivot kNoPivot = {kRound, -kDeepest};

SHIPS_INLINE ExpPivot exp_pivot(float largest) {
  return {add(kRound, -rintf(multiply(largest, kLog2E))), add(largest, -kDeepest)};
}

SHIPS_INLINE double log_of_pivot(ExpPivot pivot) { return (kRound - double{pivot.round}) * 0x1.62e42fefa39efp-1; }

// exp(x) / 2^n, to 1.2e-7 of it, for x up to 30 above the largest logit. x - m ln2 is exact but for 1e-8.
SHIPS_INLINE float exp_f32(float x, ExpPivot pivot) {
  x = fmaxf(x, pivot.lowest);
  const float rounded = fmaf(x, kLog2E, pivot.round);
  const float m = add(rounded, -pivot.round);
  const float r = fmaf(-m, 0x1.7f7d1cp-20f, fmaf(-m, 0x1.62e4p-1f, x));
  float e = 0x1.6d117cp-10f;  // interpolated at Chebyshev nodes, 1e-8
  e = fmaf(e, r, 0x1.120be2p-7f);
  e = fmaf(e, r, 0x1.555518p-5f);
  e = fmaf(e, r, 0x1.5554dcp-3f);
  e = fmaf(e, r, 0.5f);
  e = fmaf(e, r, 1.0f);
  e = fmaf(e, r, 1.0f);
  return shifted_exponent(e, rounded);
}

// (x_a - x_b) - center, to 6e-8 of it: the first difference is exact, as a pair of floats (Knuth).
SHIPS_INLINE float distance(float x_a, float x_b, float center) {
  const float difference = add(x_a, -x_b);
  const float minus_b = add(difference, -x_a);
  const float lost = add(add(x_a, -add(difference, -minus_b)), -add(x_b, minus_b));
  return add(add(difference, -center), lost);
}

// exp(d) - 1 - d over d^2, on [-1, 1]: interpolated at Chebyshev nodes, 2e-8
SHIPS_INLINE float near_excess(float d) {
  float q = 0x1.78a70ep-19f;
  q = fmaf(q, d, 0x1.a971fcp-16f);
  q = fmaf(q, d, 0x1.a009p-13f);
  q = fmaf(q, d, 0x1.6bff52p-10f);
  q = fmaf(q, d, 0x1.11111ep-7f);
  q = fmaf(q, d, 0x1.55557ap-5f);
  q = fmaf(q, d, 0x1.555556p-3f);
  q = fmaf(q, d, 0.5f);
  return multiply(multiply(d, d), q);
}

struct KlSums {
  double excess = 0.0;  // sum w (exp(d) - 1 - d); NaN where a distance is beyond the range, or no number
  double mean = 0.0;    // sum w d
};

// Adds a run's terms: together in float32, then to the sums in float64.
template <int count>
SHIPS_INLINE void add_run(KlSums& sums, const float (&d)[count], const float (&weights)[count]) {
  float excess[count];
  float farthest = 0.0f;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    excess[i] = near_excess(d[i]);
    farthest = fmaxf(farthest, fabsf(d[i]));
  }
  if (farthest > kNearDistance) {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      if (fabsf(d[i]) > kNearDistance) excess[i] = add(add(exp_f32(d[i], kNoPivot), -1.0f), -d[i]);
    }
    if (farthest > kFarthestDistance) excess[0] = NAN;
  }
  float run_excess = multiply(excess[0], weights[0]);
  float run_mean = multiply(d[0], weights[0]);
#pragma unroll
  for (int i = 1; i < count; ++i) {
    run_excess = fmaf(excess[i], weights[i], run_excess);
    run_mean = fmaf(d[i], weights[i], run_mean);
  }
  sums.excess += run_excess;
  sums.mean += run_mean;
}

template <int count>
SHIPS_INLINE void add_weights(double& sum, const float (&weights)[count]) {
  float run = weights[0];
#pragma unroll
  for (int i = 1; i < count; ++i) run = add(run, weights[i]);
  sum += run;
}

// A piece of the vocabulary: the logarithm of each row's sum of exps over it, and the KL of the two distributions
// within it. NaN for NaN or +inf, -inf for nothing but -inf.
struct KlPart {
  double log_b, log_a, kl_nats;
};

// False where the sums do not tell the KL well enough: it has lost more than kLargestLoss of their accuracy.
SHIPS_INLINE bool part_from_sums(double weight, KlSums sums, float largest_base, float center, KlPart& part) {
  const double excess = sums.excess / weight;
  const double gain = excess + sums.mean / weight;  // sum p_b exp(d) - 1
  const double log_gain = log1p(gain);
  const double kl = excess - (gain - log_gain);
  part.log_b = log_of_pivot(exp_pivot(largest_base)) + log(weight);
  part.log_a = part.log_b + (center + log_gain);
  part.kl_nats = kl < 0.0 ? 0.0 : kl;
  return fabsf(largest_base) <= kLargestLogit && gain > -0.5 && excess <= kLargestLoss * part.kl_nats;
}

// The same in float64, from the rows' norms over the part. Its KL, 0 so far, is the sum of divergence_terms; there is
// none to take where a row has nothing but -inf.
SHIPS_INLINE KlPart part_from_norms(RowNorm a, RowNorm b) {
  return {b.largest == -HUGE_VAL ? -HUGE_VAL : b.largest + b.log_sum,
          a.largest == -HUGE_VAL ? -HUGE_VAL : a.largest + a.log_sum, 0.0};
}

SHIPS_INLINE bool has_terms(KlPart part) { return part.log_a != -HUGE_VAL && part.log_b != -HUGE_VAL; }

SHIPS_INLINE double shift_of(RowNorm a, RowNorm b) { return (a.largest - b.largest) + (a.log_sum - b.log_sum); }

// KL of a row from its parts, by the chain rule: that of the parts' probabilities, as ships_divergence.h has it, and
// each part's own times its probability. `lanes` threads share the work; largest(x) and total(x) are over all of them.
#pragma nv_exec_check_disable  // largest and total are for one side only
template <typename Largest, typename Total>
SHIPS_INLINE double kl_of_parts(const KlPart* parts, int count, int lane, int lanes, const Largest& largest,
                                const Total& total) {
  RowNorm a{-HUGE_VAL, 0.0}, b{-HUGE_VAL, 0.0};
  for (int k = lane; k < count; k += lanes) {
    a.largest = fmax(a.largest, parts[k].log_a);
    b.largest = fmax(b.largest, parts[k].log_b);
  }
  a.largest = largest(a.largest);
  b.largest = largest(b.largest);
  for (int k = lane; k < count; k += lanes) {
    a.log_sum += exp_f64(clamp_exponent(parts[k].log_a - a.largest));
    b.log_sum += exp_f64(clamp_exponent(parts[k].log_b - b.largest));
  }
  a.log_sum = log(total(a.log_sum));
  b.log_sum = log(total(b.log_sum));
  if (!(a.log_sum + b.log_sum < HUGE_VAL)) return NAN;  // NaN in a part, or nothing but -inf
  const double shift = shift_of(a, b);
  double kl_nats = 0.0;
  for (int k = lane; k < count; k += lanes) {
    kl_nats += divergence_terms<false>(parts[k].log_a, parts[k].log_b, a, b, shift).kl;
    const double log_p = (parts[k].log_b - b.largest) - b.log_sum;
    if (log_p > -HUGE_VAL) kl_nats += exp_f64(clamp_exponent(log_p)) * parts[k].kl_nats;
  }
  return total(kl_nats);
}

// The base row of an ablated one; num_base, which comes last, for all that is out of range.
SHIPS_INLINE int64_t base_of(int64_t mapped, int64_t num_base) {
  return mapped >= 0 && mapped < num_base ? mapped : num_base;
}

// Rows in the order of their base rows. `threads` work on each base row p, with a piece of row_map each: the first
// step counts the rows before p's, and p's own, the second puts p's own where they belong, from `at` on.
struct RowCounts {
  int before, own;
};

SHIPS_INLINE RowCounts count_rows(const int64_t* row_map, int64_t num_ablated, int64_t num_base, int64_t p,
                                  int thread, int threads) {
  RowCounts counts{0, 0};
  for (int64_t i = num_ablated * thread / threads; i < num_ablated * (thread + 1) / threads; ++i) {
    const int64_t base = base_of(row_map[i], num_base);
    counts.before += base < p;
    counts.own += base == p;
  }
  return counts;
}

SHIPS_INLINE int first_place(const RowCounts* counts /* [threads] */, int thread, int threads) {
  int at = 0;
  for (int i = 0; i < threads; ++i) at += counts[i].before + (i < thread ? counts[i].own : 0);
  return at;
}

SHIPS_INLINE void place_rows(const int64_t* row_map, int64_t num_ablated, int64_t num_base, int64_t p, int thread,
                             int threads, int at, int32_t* order /* [N] */) {
  for (int64_t i = num_ablated * thread / threads; i < num_ablated * (thread + 1) / threads; ++i) {
    if (base_of(row_map[i], num_base) == p) order[at++] = static_cast<int32_t>(i);
  }
}

}  // namespace shipsfast
