// Instantiates the kernels of csrc/ships_kl.cuh and csrc/ships_divergence.cuh for test_csrc_nvcc.py. Run without a
// GPU, it does on the host what they would:
//
//     kl_driver                    accuracy of the arithmetic against long double, one `name value` per line
//     kl_driver rows FILE          the KL of rows of logits, one per line, summed in the kernel's order
//     kl_driver order P [ROW ...]  the order of the ablated rows with this row_map
//
// FILE: int64 LogitType, V and N; base [V]; ablated [N, V].

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/ships_divergence.cuh"
#include "../../csrc/ships_kl.cuh"

namespace shipsfast {
template void launch_kl_rows<__nv_bfloat16>(const KlRows&, int32_t*, KlPart*, cudaStream_t);
template void launch_kl_rows<__half>(const KlRows&, int32_t*, KlPart*, cudaStream_t);
template void launch_kl_rows<float>(const KlRows&, int32_t*, KlPart*, cudaStream_t);
template void launch_kl_rows<double>(const KlRows&, int32_t*, KlPart*, cudaStream_t);
template void launch_divergence_rows<__nv_bfloat16>(const DivergenceRows&, RowNorm*, cudaStream_t);
template void launch_divergence_rows<__half>(const DivergenceRows&, RowNorm*, cudaStream_t);
template void launch_divergence_rows<float>(const DivergenceRows&, RowNorm*, cudaStream_t);
template void launch_divergence_rows<double>(const DivergenceRows&, RowNorm*, cudaStream_t);
}  // namespace shipsfast

using namespace shipsfast;

// Largest relative error of exp_f32 for logits this far below (or above) the largest, which has that size.
static double exp_error(double largest, double low, double high) {
  const ExpPivot pivot = exp_pivot(static_cast<float>(largest));
  std::mt19937_64 random(1);
  std::uniform_real_distribution<double> uniform(largest + low, largest + high);
  double worst = 0.0;
  for (int i = 0; i < 200000; ++i) {
    const float x = static_cast<float>(uniform(random));
    const long double pivot_log = (kRound - static_cast<long double>(pivot.round)) * 0.693147180559945309417232L;
    const long double exact = std::exp(x - pivot_log);
    worst = std::fmax(worst, std::fabs(static_cast<double>(exp_f32(x, pivot) / exact - 1)));
  }
  return worst;
}

// Largest relative error of exp(d) - 1 - d as add_run has it, for |d| from low to high.
static double excess_error(double low, double high) {
  std::mt19937_64 random(1);
  std::uniform_real_distribution<double> uniform(std::log(low), std::log(high));
  double worst = 0.0;
  for (int i = 0; i < 200000; ++i) {
    const float d[1] = {static_cast<float>((i % 2 ? 1 : -1) * std::exp(uniform(random)))};
    const float weights[1] = {1.0f};
    KlSums sums;
    add_run(sums, d, weights);
    const long double x = d[0];
    long double exact = std::expm1(x) - x;
    if (std::fabs(x) < 0.01L) exact = x * x * (0.5L + x * (1 / 6.0L + x * (1 / 24.0L + x * (1 / 120.0L + x / 720))));
    worst = std::fmax(worst, std::fabs(static_cast<double>(sums.excess / exact - 1)));
  }
  return worst;
}

// What __shfl_down_sync by 16, 8, 4, 2, 1 leaves in lane 0
static double warp_sum(std::vector<double> lanes) {
  for (int offset = 16; offset > 0; offset /= 2) {
    for (int lane = 0; lane < offset; ++lane) lanes[lane] += lanes[lane + offset];
  }
  return lanes[0];
}

template <typename T>
static RowNorm row_norm(const T* x, int count) {
  RowNorm norm{-HUGE_VAL, 0.0};
  for (int v = 0; v < count; ++v) {
    if (!(to_double(x[v]) < HUGE_VAL)) return {NAN, NAN};
    norm.largest = std::fmax(norm.largest, to_double(x[v]));
  }
  for (int v = 0; v < count; ++v) norm.log_sum += exp_f64(clamp_exponent(to_double(x[v]) - norm.largest));
  norm.log_sum = std::log(norm.log_sum);
  return norm;
}

template <typename T>
static KlPart host_exact_part(const T* x_a, const T* x_b, int count) {
  const RowNorm a = row_norm(x_a, count), b = row_norm(x_b, count);
  KlPart part = part_from_norms(a, b);
  for (int v = 0; has_terms(part) && v < count; ++v) {
    part.kl_nats += divergence_terms<false>(to_double(x_a[v]), to_double(x_b[v]), a, b, shift_of(a, b)).kl;
  }
  return part;
}

// group_parts for one row. Sets exact if it goes to float64.
template <typename T>
static KlPart host_part(const T* x_a, const T* x_b, int count, bool& exact) {
  exact = true;
  if constexpr (sizeof(T) < sizeof(double)) {
    constexpr int kRun = 16 / sizeof(T);
    const int whole = count / kRun * kRun;
    std::vector<std::vector<int>> dealt(kKlThreads);
    for (int v = 0; v < whole; ++v) dealt[v / kRun % kKlThreads].push_back(v);
    for (int v = whole; v < count; ++v) dealt[v - whole].push_back(v);
    KlScratch scratch;
    for (int sample = 0; sample < kSamples; ++sample) {
      scratch.largest[sample] = -HUGE_VALF;
      scratch.at[sample] = 0;
      for (int thread = 16 * sample; thread < 16 * sample + 16; ++thread) {
        for (int v : dealt[thread]) {
          const float x = to_float(x_b[v]);
          if (!(x > scratch.largest[sample] || (x == scratch.largest[sample] && v < scratch.at[sample]))) continue;
          scratch.largest[sample] = x;
          scratch.at[sample] = v;
        }
      }
    }
    const float largest = *std::max_element(scratch.largest, scratch.largest + kSamples);
    const ExpPivot pivot = exp_pivot(largest);
    const float center = center_of(x_a, x_b, pivot, scratch);
    std::vector<double> excess(kKlThreads), mean(kKlThreads), weight(kKlThreads);
    for (int thread = 0; thread < kKlThreads; ++thread) {
      KlSums sums;
      const std::vector<int>& mine = dealt[thread];
      size_t at = 0;
      for (; at + kTerms <= mine.size(); at += kTerms) {
        float weights[kTerms], d[kTerms];
        for (int i = 0; i < kTerms; ++i) {
          const int v = mine[at + i];
          weights[i] = exp_f32(to_float(x_b[v]), pivot);
          d[i] = distance(to_float(x_a[v]), to_float(x_b[v]), center);
        }
        add_weights(weight[thread], weights);
        add_run(sums, d, weights);
      }
      for (; at < mine.size(); ++at) {
        const float weights[1] = {exp_f32(to_float(x_b[mine[at]]), pivot)};
        const float d[1] = {distance(to_float(x_a[mine[at]]), to_float(x_b[mine[at]]), center)};
        add_weights(weight[thread], weights);
        add_run(sums, d, weights);
      }
      excess[thread] = sums.excess;
      mean[thread] = sums.mean;
    }
    const auto total = [](const std::vector<double>& threads) {
      std::vector<double> lanes(32);
      for (int i = 0; i < kKlThreads; ++i) lanes[i % 32] += threads[i];
      return warp_sum(lanes);
    };
    KlPart part;
    exact = !part_from_sums(total(weight), {total(excess), total(mean)}, largest, center, part);
    if (!exact) return part;
  }
  return host_exact_part(x_a, x_b, count);
}

// KL(base || ablated). Counts the parts that go to float64.
template <typename T>
static double host_kl(const T* x_a, const T* x_b, int vocab, int& exact_parts) {
  std::vector<KlPart> parts;
  for (int begin = 0; begin < vocab; begin += kKlPart) {
    bool exact;
    parts.push_back(host_part(x_a + begin, x_b + begin, std::min(kKlPart, vocab - begin), exact));
    exact_parts += exact;
  }
  const auto alone = [](double x) { return x; };
  return kl_of_parts(parts.data(), static_cast<int>(parts.size()), 0, 1, alone, alone);
}

template <typename T>
static void kl_of_rows(std::ifstream& file, int64_t vocab, int64_t num_ablated) {
  std::vector<T> x_b(vocab), x_a(vocab);
  const auto read = [&](std::vector<T>& row) {
    file.read(reinterpret_cast<char*>(row.data()), static_cast<std::streamsize>(vocab * sizeof(T)));
  };
  read(x_b);
  for (int64_t i = 0; i < num_ablated; ++i) {
    read(x_a);
    int exact_parts = 0;
    const double kl_nats = host_kl(x_a.data(), x_b.data(), static_cast<int>(vocab), exact_parts);
    std::printf("%.17g %d\n", kl_nats, exact_parts);
  }
}

static void print_order(int64_t num_base, const std::vector<int64_t>& row_map) {
  const int64_t num_ablated = static_cast<int64_t>(row_map.size());
  std::vector<int32_t> order(num_ablated, -1);
  for (int64_t p = 0; p <= num_base; ++p) {
    std::vector<RowCounts> counts;
    for (int thread = 0; thread < kOrderThreads; ++thread) {
      counts.push_back(count_rows(row_map.data(), num_ablated, num_base, p, thread, kOrderThreads));
    }
    for (int thread = 0; thread < kOrderThreads; ++thread) {
      const int at = first_place(counts.data(), thread, kOrderThreads);
      place_rows(row_map.data(), num_ablated, num_base, p, thread, kOrderThreads, at, order.data());
    }
  }
  for (int32_t row : order) std::printf("%d\n", row);
}

// Largest relative error of one row's divergences, for float32 logits `change` apart, by their definitions in
// long double: its 64 bits leave 1e-19 / change of KL and JS, so `change` is not to be tiny.
static double divergence_error(int vocab, double spread, double change, int bit) {
  double worst = 0.0;
  for (int seed = 0; seed < 8; ++seed) {
    std::mt19937_64 random(seed);
    std::normal_distribution<double> normal;
    std::vector<float> x_b(vocab), x_a(vocab);
    RowNorm a_norm{-HUGE_VAL, 0.0}, b_norm{-HUGE_VAL, 0.0};
    for (int v = 0; v < vocab; ++v) {
      const double x = spread * normal(random);
      x_b[v] = static_cast<float>(x);
      x_a[v] = static_cast<float>(x + change * normal(random));
      a_norm.largest = std::fmax(a_norm.largest, x_a[v]);
      b_norm.largest = std::fmax(b_norm.largest, x_b[v]);
    }
    long double sum_a = 0.0L, sum_b = 0.0L;
    for (int v = 0; v < vocab; ++v) {
      a_norm.log_sum += exp_f64(clamp_exponent(x_a[v] - a_norm.largest));
      b_norm.log_sum += exp_f64(clamp_exponent(x_b[v] - b_norm.largest));
      sum_a += std::exp(static_cast<long double>(x_a[v]));
      sum_b += std::exp(static_cast<long double>(x_b[v]));
    }
    a_norm.log_sum = std::log(a_norm.log_sum);
    b_norm.log_sum = std::log(b_norm.log_sum);
    const double shift = (a_norm.largest - b_norm.largest) + (a_norm.log_sum - b_norm.log_sum);
    const long double shift_exact = std::log(sum_a / sum_b);
    DivergenceSums sums;
    long double exact[4] = {};
    for (int v = 0; v < vocab; ++v) {
      sums += divergence_terms<true>(x_a[v], x_b[v], a_norm, b_norm, shift);
      const long double p_b = std::exp(static_cast<long double>(x_b[v])) / sum_b;
      const long double d = static_cast<long double>(x_a[v]) - x_b[v] - shift_exact;
      const long double ratio_less_1 = std::expm1(d);
      exact[0] += p_b * (ratio_less_1 - d);
      exact[1] += p_b * (d * ratio_less_1 - (ratio_less_1 - d));
      exact[2] += p_b * (d * (1.0L + ratio_less_1) - (2.0L + ratio_less_1) * std::log1p(ratio_less_1 / 2)) / 2;
      exact[3] += p_b * std::fabs(ratio_less_1) / 2;
    }
    double result = 0.0;
    store_divergences(sums, int64_t{1} << bit, &result, 1);
    worst = std::fmax(worst, std::fabs(static_cast<double>((result - exact[bit]) / exact[bit])));
  }
  return worst;
}

int main(int argc, char** argv) {
  if (argc > 2 && std::string(argv[1]) == "rows") {
    std::ifstream file(argv[2], std::ios::binary);
    int64_t sizes[3];
    file.read(reinterpret_cast<char*>(sizes), sizeof sizes);
    with_logit_type<__nv_bfloat16, __half>(static_cast<LogitType>(sizes[0]), [&](auto logit) {
      kl_of_rows<decltype(logit)>(file, sizes[1], sizes[2]);
    });
    return file.good() ? 0 : 1;
  }
  if (argc > 2 && std::string(argv[1]) == "order") {
    std::vector<int64_t> row_map;
    for (int i = 3; i < argc; ++i) row_map.push_back(std::atoll(argv[i]));
    print_order(std::atoll(argv[2]), row_map);
    return 0;
  }
  std::printf("exp_near_the_largest %.3e\n", exp_error(12.3, -17.0, 0.0));
  std::printf("exp_full_range %.3e\n", exp_error(-90000.0, -82.9, 30.0));
  std::printf("excess_tiny %.3e\n", excess_error(1e-18, 0.01));
  std::printf("excess_near %.3e\n", excess_error(0.01, 1.0));
  std::printf("excess_far %.3e\n", excess_error(1.0, 30.0));
  const char* names[4] = {"kl", "reverse_kl", "js", "total_variation"};
  for (int bit = 0; bit < 4; ++bit) {
    std::printf("%s_small_relative %.3e\n", names[bit], divergence_error(32000, 4.0, 0.001, bit));
    std::printf("%s_large_relative %.3e\n", names[bit], divergence_error(32000, 4.0, 3.0, bit));
  }
  return 0;
}
