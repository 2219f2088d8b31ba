// What the element-wise CPU kernels share: builds for three instruction sets, and an exp that vectorises.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SHIPS_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define SHIPS_CLONES
#endif

namespace shipsfast {

// exp for floats by exp(x) = 2^k exp(r), |r| <= ln2 / 2, to 1 ulp or so; branch-free, so that loops vectorise.
inline float exp_of(float x) {
  // In this order: the other way round GCC 12 at -O3 makes two loops of one (loop unswitching), each with its own division, and
  // a gated row takes 2.4 times as long.
  x = x > 88.0f ? 88.0f : x;
  x = x < -87.0f ? -87.0f : x;
  const float k = std::floor(x * 1.44269504f + 0.5f);
  float r = x - k * 0.693359375f;
  r = r + k * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // The low mantissa bits of k + 1.5 * 2^23 are k. A cast to an integer would be undefined for NaN, which passes the
  // clamp and makes p NaN.
  const float shifted = k + 12582912.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127u) << 23;
  float two_to_k;
  std::memcpy(&two_to_k, &bits, sizeof(float));
  return p * two_to_k;
}
inline double exp_of(double x) { return std::exp(x); }

}  // namespace shipsfast
