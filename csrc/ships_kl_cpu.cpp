// KL(base || ablated) per row of logits, on the CPU, in float64, with one read of the ablated logits.
//
// With a pivot for each row, z = x_b - max(x_b), t = x_a - x_a[argmax x_b], e_b = exp(z), e_a = exp(t):
//
//     KL = log(sum e_a / sum e_b) - sum e_b (t - z) / sum e_b
//
// so one exp per ablated logit; z and e_b come once per base row. Three things make it exact:
//   * sum e_a >= 1, since the pivot's own term is 1: underflow costs nothing. Should another logit be more
//     than about 690 above the pivot, the row is done again with its true maximum as pivot.
//   * where the sums are close, log(sum e_a / sum e_b) = log1p(sum (e_a - e_b) / sum e_b): errors are
//     then relative to the difference, and equal rows give exactly 0.
//   * a row is one thread's work from end to end, so results do not depend on the number of threads.
// Base logits of -inf have e_b = 0 and weigh nothing. Every other e_b is positive, because its
// exponent is clamped at -708: an ablated -inf there gives t = -inf and KL = +inf, as it should.

#include <cmath>
#include <cstdint>
#include <vector>

#include "ships_cpu.h"

namespace shipsfast {
namespace {

constexpr double kLargestSum = 1e300;  // a sum of exps above this may have met exp_f64's ceiling

struct RowSums {
  double exps;        // sum e_a
  double difference;  // sum (e_a - e_b)
  double weighted;    // sum e_b (t - z)
};

template <typename T>
SHIPS_INLINE RowSums row_sums_body(const T* x, const double* e_b, const double* z, int64_t vocab, double pivot) {
  RowSums sums{0.0, 0.0, 0.0};
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int64_t end = begin + kBlock < vocab ? begin + kBlock : vocab;
    double exps = 0.0, difference = 0.0, weighted = 0.0;
#pragma omp simd reduction(+ : exps, difference, weighted)
    for (int64_t v = begin; v < end; ++v) {
      const double t = to_f64(x[v]) - pivot;
      const double e_a = exp_f64(clamp_exponent(t));
      const double term = e_b[v] * (t - z[v]);
      exps += e_a;
      difference += e_a - e_b[v];
      weighted += e_b[v] > 0.0 ? term : 0.0;
    }
    sums.exps += exps;
    sums.difference += difference;
    sums.weighted += weighted;
  }
  return sums;
}

// z and e_b of one base row; returns sum e_b.
template <typename T>
SHIPS_INLINE double base_row_body(const T* x, double* e_b, double* z, int64_t vocab, double pivot) {
  double total = 0.0;
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int64_t end = begin + kBlock < vocab ? begin + kBlock : vocab;
    double exps = 0.0;
#pragma omp simd
    for (int64_t v = begin; v < end; ++v) {
      const double d = to_f64(x[v]) - pivot;
      z[v] = d;
      e_b[v] = clamp_exponent(d);
    }
    // In a loop of its own: GCC would merge this comparison with the clamp's into branches, and not vectorise.
#pragma omp simd reduction(+ : exps)
    for (int64_t v = begin; v < end; ++v) {
      const double e = exp_f64(e_b[v]);
      e_b[v] = z[v] == -kInfinity ? 0.0 : e;
      exps += e_b[v];
    }
    total += exps;
  }
  return total;
}

template <typename T>
struct RowFunctions {
  decltype(&row_sums_body<T>) row_sums = variant<&row_sums_body<T>>();
  decltype(&base_row_body<T>) base_row = variant<&base_row_body<T>>();
  decltype(&row_max_body<T>) row_max = variant<&row_max_body<T>>();
};

// One thread's copy of the base row that its ablated rows are compared with.
template <typename T>
class BaseRow {
 public:
  BaseRow(const RowFunctions<T>& functions, const KlRows& rows)
      : functions_(functions), kl_nats_(rows.kl_nats), e_b_(rows.vocab), z_(rows.vocab) {}

  void load(const T* x, int64_t vocab) {
    const double largest = functions_.row_max(x, vocab);
    valid_ = std::isfinite(largest);  // not with +inf, or nothing but -inf and NaN
    if (!valid_) return;
    argmax_ = 0;
    while (to_f64(x[argmax_]) != largest) ++argmax_;
    total_ = functions_.base_row(x, e_b_.data(), z_.data(), vocab, largest);
  }

  void score(int64_t i, const T* x, int64_t vocab) const { kl_nats_[i] = kl_nats(x, vocab); }

 private:
  double kl_nats(const T* x, int64_t vocab) const {
    if (!valid_) return kNaN;
    double pivot = to_f64(x[argmax_]);
    RowSums sums = functions_.row_sums(x, e_b_.data(), z_.data(), vocab, pivot);
    if (!(sums.exps < kLargestSum)) {  // also NaN, and with an infinite pivot
      pivot = functions_.row_max(x, vocab);  // if this is not finite, NaN comes out below
      sums = functions_.row_sums(x, e_b_.data(), z_.data(), vocab, pivot);
    }
    const double log_ratio = std::fabs(sums.difference) < 0.5 * total_ ? std::log1p(sums.difference / total_)
                                                                       : std::log(sums.exps / total_);
    const double kl = log_ratio - sums.weighted / total_;
    return kl < 0.0 ? 0.0 : kl;  // KL >= 0: what is below is rounding
  }

  RowFunctions<T> functions_;
  double* kl_nats_;  // [N]
  std::vector<double> e_b_, z_;  // [V]
  int64_t argmax_ = 0;
  double total_ = 0.0;
  bool valid_ = false;
};

}  // namespace

void kl_rows_cpu(const KlRows& rows) {
  with_logit_type<BFloat16, Float16>(rows.type, [&](auto logit) {
    using T = decltype(logit);
    const RowFunctions<T> functions;
    for_each_row<T>(rows, [&] { return BaseRow<T>(functions, rows); });
  });
}

}  // namespace shipsfast
