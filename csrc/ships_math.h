// Float64 exp and logarithm without branches or calls, for loops that vectorise on the CPU and for the device.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define SHIPS_INLINE static __host__ __device__ __forceinline__
#elif defined(__GNUC__) || defined(__clang__)
#define SHIPS_INLINE static inline __attribute__((always_inline))
#else
#define SHIPS_INLINE static inline
#endif

namespace shipsfast {

// Into the range of exp_f64. Comparisons with NaN are false: NaN passes.
SHIPS_INLINE double clamp_exponent(double x) {
  x = x < -708.0 ? -708.0 : x;
  return x > 709.0 ? 709.0 : x;
}

// exp(x) = scale * (1 + r + tail), tail = exp(r) - 1 - r
struct ExpParts {
  double scale;  // a power of two, 1 for |x| < ln2/2
  double r;
  double tail;
};

// For x in [-708, 709]; NaN -> NaN. x = n ln2 + r with |r| <= ln2/2 (Cody and Waite: n * ln2_hi is exact),
// tail = r^2 q(r), with q of degree 9 interpolated at Chebyshev nodes (1.6e-17).
SHIPS_INLINE ExpParts exp_parts(double x) {
  constexpr double kLog2E = 0x1.71547652b82fep+0;
  constexpr double kLn2Hi = 0x1.62e42fefa38p-1;
  constexpr double kLn2Lo = 0x1.ef35793c7673p-45;
  constexpr double kRound = 0x1.8p52;  // adding it leaves the nearest integer in the low mantissa bits
  const double rounded = x * kLog2E + kRound;
  const double n = rounded - kRound;
  const double r = (x - n * kLn2Hi) - n * kLn2Lo;
  const double r2 = r * r;
  const double r4 = r2 * r2;
  const double q01 = 0.5 + r * 0x1.5555555555556p-3;
  const double q23 = 0x1.5555555553d68p-5 + r * 0x1.11111111109b5p-7;
  const double q45 = 0x1.6c16c17889f3cp-10 + r * 0x1.a01a01a7c2f2cp-13;
  const double q67 = 0x1.a019b914881bap-16 + r * 0x1.71de0db2eb873p-19;
  const double q89 = 0x1.28917c9f3a495p-22 + r * 0x1.af389eea54156p-26;
  const double q = (q01 + r2 * q23) + r4 * ((q45 + r2 * q67) + r4 * q89);
  uint64_t bits;
  memcpy(&bits, &rounded, sizeof bits);
  bits = (bits << 52) + (uint64_t{1023} << 52);  // 2^n
  double scale;
  memcpy(&scale, &bits, sizeof scale);
  return {scale, r, r2 * q};
}

// exp for x in [-708, 709], to about 1 ulp; NaN -> NaN.
SHIPS_INLINE double exp_f64(double x) {
  const ExpParts e = exp_parts(x);
  return e.scale + e.scale * (e.r + e.tail);
}

// -log(1 - w) - w for w in [0, 1/2], relatively accurate down to w = 0.
// -log(1 - w) = 2 atanh(f), f = w / (2 - w), and 2 f = w + w f. The polynomial is (atanh(f) - f) / f^3 in f^2,
// of degree 9 on [0, 1/9], interpolated at Chebyshev nodes (7e-17).
SHIPS_INLINE double minus_log_rest(double w) {
  const double f = w / (2.0 - w);
  const double x = f * f;
  const double x2 = x * x;
  const double x4 = x2 * x2;
  const double q01 = 0x1.5555555555555p-2 + x * 0x1.999999999a3ddp-3;
  const double q23 = 0x1.24924923d44c6p-3 + x * 0x1.c71c727143318p-4;
  const double q45 = 0x1.745cf0b0e03bdp-4 + x * 0x1.3b18b294bebf9p-4;
  const double q67 = 0x1.10ac75dc602b1p-4 + x * 0x1.eb905e8575054p-5;
  const double q89 = 0x1.687a6e7c95176p-5 + x * 0x1.4b0a26c5f2aefp-4;
  const double q = (q01 + x2 * q23) + x4 * ((q45 + x2 * q67) + x4 * q89);
  return w * f + 2.0 * f * x * q;
}

}  // namespace shipsfast
