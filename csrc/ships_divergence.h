// What shipsfast::divergence_rows computes, for the CPU and the device alike. No torch in here.
//
//     kl               KL(base || ablated) = sum p_b log(p_b / p_a)                       nats
//     reverse_kl       KL(ablated || base) = sum p_a log(p_a / p_b)                       nats
//     js               (KL(base || m) + KL(ablated || m)) / 2,  m = (p_b + p_a) / 2       nats, 0 .. ln 2
//     total_variation  sum |p_a - p_b| / 2                                                0 .. 1
//
// of p = softmax(x). With the rows' log sum exp known, everything follows per token from
//
//     d = log p_a - log p_b = (x_a - x_b) - (lse_a - lse_b),  a = |d|,  s = exp(-a),  top = max(p_a, p_b)
//
// as sums of terms that are never negative, so that nothing cancels between tokens:
//
//     toward = s - 1 + a          of p log(p / q) + q - p, where p is the larger and q the smaller probability
//     away   = 1 - s (1 + a)      of q log(q / p) + p - q
//     kl += top * (p_b > p_a ? toward : away),  reverse_kl += top * (p_b > p_a ? away : toward)
//     js += top * ((1 + s) log(2 / (1 + s)) - s a) / 2
//     total_variation += top * (1 - s) / 2
//
// (q - p sums to 0 over the tokens.) For small a each is written in tail = s - 1 + a, which the exp yields without
// cancellation, so that terms near a^2 keep all their digits; and x_a - x_b is exact where the logits are close. An
// error e in the log sums adds some e^2 to kl, reverse_kl and js; total_variation is freed of it by what
// sum (p_a - p_b) then is instead of 0.
#pragma once

#include <cmath>

#include "ships_kl.h"
#include "ships_math.h"

namespace shipsfast {

enum DivergenceBit : int64_t { kKl = 1, kReverseKl = 2, kJs = 4, kTotalVariation = 8 };
constexpr int64_t kEveryDivergence = kKl | kReverseKl | kJs | kTotalVariation;

struct DivergenceRows : LogitRows {
  int64_t which;    // DivergenceBits
  double* results;  // [bits in which, N], in the order of the bits
};

// Host memory. row_map has been checked against num_base. Throws std::runtime_error for a bad SHIPSFAST_CPU_ISA.
void divergence_rows_cpu(const DivergenceRows& rows);

// Device memory, on that device's current stream. A row whose row_map is out of range gets NaN.
void divergence_rows_cuda(const DivergenceRows& rows, int32_t device_index);

// log sum exp(x) = largest + log_sum; log_sum is NaN for a row with NaN, +inf, or nothing but -inf.
struct RowNorm {
  double largest;
  double log_sum;
};

struct DivergenceSums {
  double kl = 0.0;
  double reverse_kl = 0.0;
  double js = 0.0;       // twice the divergence
  double gained = 0.0;   // sum (p_a - p_b) where p_a > p_b
  double lost = 0.0;     // sum (p_b - p_a) elsewhere
  double mass_up = 0.0;  // sum p_a where p_a > p_b
};

SHIPS_INLINE void operator+=(DivergenceSums& sums, const DivergenceSums& terms) {
  sums.kl += terms.kl;
  sums.reverse_kl += terms.reverse_kl;
  sums.js += terms.js;
  sums.gained += terms.gained;
  sums.lost += terms.lost;
  sums.mass_up += terms.mass_up;
}

// One token's part of the sums; js is 0 without with_js. shift = lse_a - lse_b. The rows must be valid.
// A logit of -inf in one row gives d infinite: log(q/p) counts as infinite, and top > 0 makes it show. In both
// it gives d NaN, and nothing is added.
template <bool with_js>
SHIPS_INLINE DivergenceSums divergence_terms(double x_a, double x_b, RowNorm a_norm, RowNorm b_norm, double shift) {
  constexpr double kSmall = 0.34;  // below ln2/2, where exp_parts has scale 1 and r = -a
  const double log_p_a = (x_a - a_norm.largest) - a_norm.log_sum;
  const double log_p_b = (x_b - b_norm.largest) - b_norm.log_sum;
  const double top = exp_f64(clamp_exponent(log_p_a > log_p_b ? log_p_a : log_p_b));
  const double d = (x_a - x_b) - shift;
  const bool up = d > 0.0;
  const double distance = d > 0.0 ? d : -d;
  const double a = distance >= 0.0 ? distance : 0.0;
  const double a_finite = a < 708.0 ? a : 708.0;
  const bool small = a < kSmall;
  const ExpParts parts = exp_parts(-a_finite);
  const double tail = parts.tail;
  const double s = parts.scale + parts.scale * (parts.r + tail);
  const double drop = small ? a - tail : 1.0 - s;
  const double toward = top * (small ? tail : (s - 1.0) + a);
  const double away = top * (small ? a * drop - tail : 1.0 - s * (1.0 + a_finite));
  DivergenceSums terms;
  terms.kl = up ? away : toward;
  terms.reverse_kl = up ? toward : away;
  terms.gained = up ? top * drop : 0.0;
  terms.lost = up ? 0.0 : top * drop;
  terms.mass_up = up ? top : 0.0;
  if constexpr (with_js) {
    const double half = 0.5 * drop;              // (1 + s) / 2 = 1 - half
    const double rest = minus_log_rest(half);
    const double near = (0.5 * a * a - tail) - 0.5 * tail * tail + (1.0 + s) * rest;
    const double far = (1.0 + s) * (half + rest) - s * a_finite;
    terms.js = top * (small ? near : far);
  }
  return terms;
}

// results[bit * stride] for the bits in `which`. What lies outside a divergence's range is rounding.
SHIPS_INLINE void store_divergences(const DivergenceSums& sums, int64_t which, double* results, int64_t stride) {
  constexpr double kLn2 = 0x1.62e42fefa39efp-1;
  const double excess = sums.gained - sums.lost;  // sum p_a - 1: the error of the log sums
  const double tv = sums.gained - sums.mass_up * (excess / (1.0 + excess));
  const double values[4] = {sums.kl, sums.reverse_kl, 0.5 * sums.js, tv};
  const double largest[4] = {HUGE_VAL, HUGE_VAL, kLn2, 1.0};
  for (int i = 0; i < 4; ++i) {
    if (!(which >> i & 1)) continue;
    const double value = values[i] < 0.0 ? 0.0 : values[i];
    *results = value > largest[i] ? largest[i] : value;
    results += stride;
  }
}

}  // namespace shipsfast
