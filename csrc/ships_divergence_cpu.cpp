// Divergences per row of logits, on the CPU, in float64. The formulas are in ships_divergence.h.
//
// An ablated row is read three times: its maximum, its sum of exps, its terms. The first time brings it from
// memory; rows of both models fit a core's L2 up to some 10^5 tokens, so that the others find it there. Nothing of
// the vocabulary's size is kept. A row is one thread's work from end to end, so results do not depend on the
// number of threads; the two rows' sums of exps come from the same code, so equal rows give exactly 0.

#include <cmath>
#include <cstdint>

#include "ships_cpu.h"
#include "ships_divergence.h"

namespace shipsfast {
namespace {

constexpr int64_t kChunk = 512;  // elements per partial sum, and in float64 at a time: two chunks stay in L1

// x[0 .. count) in float64. In a loop of its own: fused with the arithmetic, a vector of 16-bit logits would widen
// to four of float64, whose intermediate values do not fit the registers.
template <typename T>
SHIPS_INLINE const double* chunk_f64(const T* x, int64_t count, double* buffer /* [kChunk] */) {
#pragma omp simd
  for (int64_t v = 0; v < count; ++v) buffer[v] = to_f64(x[v]);
  return buffer;
}
SHIPS_INLINE const double* chunk_f64(const double* x, int64_t, double*) { return x; }

template <typename T>
SHIPS_INLINE double exp_sum_body(const T* x, int64_t vocab, double largest) {
  double buffer[kChunk];
  double total = 0.0;
  for (int64_t begin = 0; begin < vocab; begin += kChunk) {
    const int64_t count = vocab - begin < kChunk ? vocab - begin : kChunk;
    const double* chunk = chunk_f64(x + begin, count, buffer);
    double exps = 0.0;
#pragma omp simd reduction(+ : exps)
    for (int64_t v = 0; v < count; ++v) exps += exp_f64(clamp_exponent(chunk[v] - largest));
    total += exps;
  }
  return total;
}

template <bool with_js, typename T>
SHIPS_INLINE DivergenceSums divergence_sums_body(const T* x_a, const T* x_b, int64_t vocab, RowNorm a_norm,
                                                 RowNorm b_norm) {
  const double shift = (a_norm.largest - b_norm.largest) + (a_norm.log_sum - b_norm.log_sum);
  double buffer_a[kChunk], buffer_b[kChunk];
  DivergenceSums sums;
  for (int64_t begin = 0; begin < vocab; begin += kChunk) {
    const int64_t count = vocab - begin < kChunk ? vocab - begin : kChunk;
    const double* chunk_a = chunk_f64(x_a + begin, count, buffer_a);
    const double* chunk_b = chunk_f64(x_b + begin, count, buffer_b);
    double kl = 0.0, reverse_kl = 0.0, js = 0.0, gained = 0.0, lost = 0.0, mass_up = 0.0;
#pragma omp simd reduction(+ : kl, reverse_kl, js, gained, lost, mass_up)
    for (int64_t v = 0; v < count; ++v) {
      const DivergenceSums terms = divergence_terms<with_js>(chunk_a[v], chunk_b[v], a_norm, b_norm, shift);
      kl += terms.kl;
      reverse_kl += terms.reverse_kl;
      js += terms.js;
      gained += terms.gained;
      lost += terms.lost;
      mass_up += terms.mass_up;
    }
    sums += {kl, reverse_kl, js, gained, lost, mass_up};
  }
  return sums;
}

template <typename T>
struct RowFunctions {
  explicit RowFunctions(bool with_js)
      : divergence_sums(with_js ? variant<&divergence_sums_body<true, T>>()
                                : variant<&divergence_sums_body<false, T>>()) {}
  decltype(&divergence_sums_body<true, T>) divergence_sums;
  decltype(&exp_sum_body<T>) exp_sum = variant<&exp_sum_body<T>>();
  decltype(&row_max_body<T>) row_max = variant<&row_max_body<T>>();
};

// The base row that one thread's ablated rows are compared with.
template <typename T>
class BaseRow {
 public:
  BaseRow(const RowFunctions<T>& functions, const DivergenceRows& rows) : functions_(functions), rows_(rows) {}

  void load(const T* x, int64_t vocab) {
    x_b_ = x;
    norm_ = norm_of(x, vocab);
  }

  void score(int64_t i, const T* x_a, int64_t vocab) const {
    const RowNorm norm = norm_of(x_a, vocab);
    DivergenceSums sums;
    if (std::isnan(norm.log_sum) || std::isnan(norm_.log_sum)) {
      sums = {kNaN, kNaN, kNaN, kNaN, kNaN, kNaN};
    } else {
      sums = functions_.divergence_sums(x_a, x_b_, vocab, norm, norm_);
    }
    store_divergences(sums, rows_.which, rows_.results + i, rows_.num_ablated);
  }

 private:
  RowNorm norm_of(const T* x, int64_t vocab) const {
    const double largest = functions_.row_max(x, vocab);
    const double log_sum = std::isfinite(largest) ? std::log(functions_.exp_sum(x, vocab, largest)) : kNaN;
    return {largest, log_sum};
  }

  RowFunctions<T> functions_;
  const DivergenceRows& rows_;
  const T* x_b_ = nullptr;  // [V]
  RowNorm norm_{kNaN, kNaN};
};

}  // namespace

void divergence_rows_cpu(const DivergenceRows& rows) {
  with_logit_type<BFloat16, Float16>(rows.type, [&](auto logit) {
    using T = decltype(logit);
    const RowFunctions<T> functions(rows.which & kJs);
    for_each_row<T>(rows, [&] { return BaseRow<T>(functions, rows); });
  });
}

}  // namespace shipsfast
