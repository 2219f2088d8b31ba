// The kernels of csrc/ships_kl.cuh on host threads, one for each of the device's, for test_csrc_nvcc.py: barriers and
// shuffles wait as they do there. `nvcc -x c++ -std=c++20` builds it, which takes it for ordinary C++.
//
//     kl_on_threads FILE   one KL per line
//
// FILE: int64 LogitType, V, P, N, the rows' stride, and where the first row begins; row_map [N]; base [P, stride] and
// ablated [N, stride], each behind as many elements as the first row begins at.

#include <algorithm>
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <memory>
#include <thread>
#include <vector>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#undef __device__
#undef __forceinline__
#undef __global__
#undef __launch_bounds__
#undef __noinline__
#undef __shared__
#define __device__
#define __forceinline__ inline
#define __global__ static
#define __launch_bounds__(...)
#define __noinline__
#define __shared__ static  // one block runs at a time

struct Index {
  unsigned x;
};

struct Warp {
  std::barrier<> barrier{32};
  double lanes[32];
};

static Index blockIdx;
static thread_local Index threadIdx;
static std::unique_ptr<std::barrier<>> block_barrier;
static std::unique_ptr<Warp[]> warps;
static std::atomic<bool> any;

static void __syncthreads() { block_barrier->arrive_and_wait(); }

static int __syncthreads_or(int vote) {
  __syncthreads();
  any = false;
  __syncthreads();
  if (vote) any = true;
  __syncthreads();
  const bool result = any;
  __syncthreads();
  return result;
}

template <typename T>
static T from_lane(T value, unsigned lane) {
  Warp& warp = warps[threadIdx.x / 32];
  warp.lanes[threadIdx.x % 32] = static_cast<double>(value);
  warp.barrier.arrive_and_wait();
  const T result = lane < 32 ? static_cast<T>(warp.lanes[lane]) : value;
  warp.barrier.arrive_and_wait();
  return result;
}

template <typename T>
static T __shfl_down_sync(unsigned, T value, int offset) {
  return from_lane(value, threadIdx.x % 32 + offset);
}

template <typename T>
static T __shfl_xor_sync(unsigned, T value, int mask) {
  return from_lane(value, threadIdx.x % 32 ^ mask);
}

using std::isnan;
using std::min;

#include "../../csrc/ships_kl.cuh"

using namespace shipsfast;

template <typename Kernel>
static void launch(int64_t blocks, int threads, const Kernel& kernel) {
  for (int64_t block = 0; block < blocks; ++block) {
    blockIdx.x = static_cast<unsigned>(block);
    block_barrier = std::make_unique<std::barrier<>>(threads);
    warps = std::make_unique<Warp[]>(threads / 32);
    std::vector<std::thread> running;
    for (int i = 0; i < threads; ++i) {
      running.emplace_back([&kernel, i] {
        threadIdx.x = i;
        kernel();
        block_barrier->arrive_and_drop();
      });
    }
    for (std::thread& thread : running) thread.join();
  }
}

template <typename T>
static void print_kl(std::ifstream& file, int64_t vocab, int64_t num_base, int64_t num_ablated, int64_t stride,
                     int64_t begin) {
  std::vector<int64_t> row_map(num_ablated);
  std::vector<T> base(begin + num_base * stride), ablated(begin + num_ablated * stride);
  const auto read = [&](auto& values) {
    file.read(reinterpret_cast<char*>(values.data()), static_cast<std::streamsize>(values.size() * sizeof values[0]));
  };
  read(row_map);
  read(base);
  read(ablated);
  const int num_parts = static_cast<int>(kl_parts(vocab));
  std::vector<int32_t> order(num_ablated);
  std::vector<KlPart> parts(num_ablated * num_parts);
  std::vector<double> kl_nats(num_ablated);
  launch(num_base + 1, kOrderThreads, [&] { kl_order_kernel(row_map.data(), num_ablated, num_base, order.data()); });
  launch((num_ablated + kRowsAtOnce - 1) / kRowsAtOnce * num_parts, kKlThreads, [&] {
    kl_parts_kernel<T>(base.data() + begin, stride, ablated.data() + begin, stride, row_map.data(), num_base,
                       num_ablated, vocab, num_parts, order.data(), parts.data());
  });
  launch((num_ablated + kKlWarps - 1) / kKlWarps, kKlThreads, [&] {
    kl_rows_kernel(parts.data(), num_parts, row_map.data(), num_base, num_ablated, kl_nats.data());
  });
  for (double kl : kl_nats) std::printf("%.17g\n", kl);
}

int main(int, char** argv) {
  std::ifstream file(argv[1], std::ios::binary);
  int64_t sizes[6];
  file.read(reinterpret_cast<char*>(sizes), sizeof sizes);
  with_logit_type<__nv_bfloat16, __half>(static_cast<LogitType>(sizes[0]), [&](auto logit) {
    print_kl<decltype(logit)>(file, sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]);
  });
  return file.good() ? 0 : 1;
}
