// Half-precision numbers on the CPU: as they lie in memory, and to and from float32 in steps that vectorise everywhere.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "ships_math.h"

namespace shipsfast {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

SHIPS_INLINE float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

SHIPS_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

SHIPS_INLINE double widened(double x) { return x; }
SHIPS_INLINE float widened(float x) { return x; }
SHIPS_INLINE float widened(BFloat16 x) { return float_from_bits(static_cast<uint32_t>(x.bits) << 16); }

// In integer steps. The subnormal case subtracts rather than scales, so that it also holds with denormals flushed to zero
// (torch.set_flush_denormal).
SHIPS_INLINE float widened(Float16 x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  const float normal = float_from_bits(magnitude + (112u << 23));
  const float subnormal = float_from_bits(magnitude + (113u << 23)) - 0x1p-14f;
  const float special = float_from_bits(magnitude | 0x7f800000u);
  const float small = magnitude < (1u << 23) ? subnormal : normal;
  const float value = magnitude >= (31u << 23) ? special : small;
  return (x.bits & 0x8000u) ? -value : value;
}

// To the nearest, ties to even; NaN stays NaN.
SHIPS_INLINE void round_to(double& to, double x) { to = x; }
SHIPS_INLINE void round_to(float& to, float x) { to = x; }
SHIPS_INLINE void round_to(BFloat16& to, float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : nearest);
}

// Adding 1/2 to what is subnormal there rounds it, and leaves it in the low bits.
SHIPS_INLINE void round_to(Float16& to, float x) {
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = bits_of(float_from_bits(magnitude) + 0.5f) - (126u << 23);
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t small = magnitude < (113u << 23) ? subnormal : normal;
  const uint32_t value = magnitude >= (143u << 23) ? special : small;
  to.bits = static_cast<uint16_t>(value | ((bits >> 16) & 0x8000u));
}

// What sums of S are made in.
template <typename S>
using Wide = std::conditional_t<std::is_same_v<S, double>, double, float>;

}  // namespace
}  // namespace shipsfast
