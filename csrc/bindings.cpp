// The native ops of shipsfast: schema, checks, and one implementation per device.
//
// Built on torch's stable ABI and Python's limited API, so that it compiles in seconds and one binary serves
// torch 2.11 to 2.13. Importing shipsfast._C registers the ops; the module itself is empty.

#include <Python.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "ships_divergence.h"
#include "ships_kl.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::string shape_of(const Tensor& tensor) {
  std::ostringstream out;
  out << '[';
  for (int64_t d = 0; d < tensor.dim(); ++d) out << (d ? ", " : "") << tensor.size(d);
  out << ']';
  return out.str();
}

template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  message << "shipsfast: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

shipsfast::LogitType logit_type(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16: return shipsfast::LogitType::kBFloat16;
    case ScalarType::Half: return shipsfast::LogitType::kFloat16;
    case ScalarType::Float: return shipsfast::LogitType::kFloat32;
    case ScalarType::Double: return shipsfast::LogitType::kFloat64;
    default: break;
  }
  require(false, "expected logits in bfloat16, float16, float32 or float64");
  return shipsfast::LogitType::kFloat32;
}

// Checks everything that can be checked without reading row_map, and fills in `rows`.
void describe(const Tensor& base, const Tensor& ablated, const Tensor& row_map, shipsfast::LogitRows& rows) {
  require(base.dim() == 2 && ablated.dim() == 2 && base.size(1) == ablated.size(1) && base.size(1) > 0,
          "expected base [P, V] and ablated [N, V] with V > 0, got base ", shape_of(base), " and ablated ",
          shape_of(ablated));
  require(row_map.dim() == 1 && row_map.size(0) == ablated.size(0), "expected row_map [N] for ablated ",
          shape_of(ablated), ", got row_map ", shape_of(row_map));
  require(row_map.scalar_type() == ScalarType::Long, "expected row_map in int64");
  require(base.scalar_type() == ablated.scalar_type(), "expected base ", shape_of(base), " and ablated ",
          shape_of(ablated), " in one dtype: convert one of them first");
  require(base.is_cpu() == ablated.is_cpu() && base.is_cpu() == row_map.is_cpu() &&
              base.get_device_index() == ablated.get_device_index() &&
              base.get_device_index() == row_map.get_device_index(),
          "expected base, ablated and row_map on one device");
  const bool single = base.size(1) == 1;
  require(single || (base.stride(1) == 1 && ablated.stride(1) == 1), "expected a contiguous last dimension, got base ",
          shape_of(base), " with stride ", base.stride(1), " and ablated ", shape_of(ablated), " with stride ",
          ablated.stride(1), ": call .contiguous() first");
  rows.type = logit_type(base);
  for (const Tensor* x : {&base, &ablated}) {
    require(reinterpret_cast<uintptr_t>(x->const_data_ptr()) % x->element_size() == 0,
            "expected logits at an aligned address: call .clone() first");
  }
  rows.base = base.const_data_ptr();
  rows.ablated = ablated.const_data_ptr();
  rows.row_map = static_cast<const int64_t*>(row_map.const_data_ptr());
  rows.num_base = base.size(0);
  rows.num_ablated = ablated.size(0);
  rows.vocab = base.size(1);
  rows.base_stride = base.stride(0);
  rows.ablated_stride = ablated.stride(0);
}

void check_row_map(const Tensor& base, const shipsfast::LogitRows& rows) {
  for (int64_t i = 0; i < rows.num_ablated; ++i) {
    require(rows.row_map[i] >= 0 && rows.row_map[i] < rows.num_base, "row_map[", i, "] = ", rows.row_map[i],
            " is not a row of base ", shape_of(base));
  }
}

// Where rows are computed. Made first: what follows allocates on the device that it sets.
struct Cpu {
  explicit Cpu(const Tensor& base) : base(base) {}
  void run(const shipsfast::KlRows& rows) const {
    check_row_map(base, rows);
    shipsfast::kl_rows_cpu(rows);
  }
  void run(const shipsfast::DivergenceRows& rows) const {
    check_row_map(base, rows);
    shipsfast::divergence_rows_cpu(rows);
  }
  const Tensor& base;
};

#ifdef SHIPSFAST_WITH_CUDA
struct Cuda {
  explicit Cuda(const Tensor& base) : index(base.get_device_index()), guard(index) {}
  void run(const shipsfast::KlRows& rows) const { shipsfast::kl_rows_cuda(rows, index); }
  void run(const shipsfast::DivergenceRows& rows) const { shipsfast::divergence_rows_cuda(rows, index); }
  const int32_t index;
  const torch::stable::accelerator::DeviceGuard guard;
};
#endif

template <typename Device>
Tensor kl_rows(const Tensor& base, const Tensor& ablated, const Tensor& row_map) {
  const Device device(base);
  const Tensor map = torch::stable::contiguous(row_map);
  shipsfast::KlRows rows;
  describe(base, ablated, map, rows);
  Tensor kl_nats = torch::stable::new_empty(base, {rows.num_ablated}, ScalarType::Double);
  rows.kl_nats = static_cast<double*>(kl_nats.mutable_data_ptr());
  if (rows.num_ablated > 0) device.run(rows);
  return kl_nats;
}

template <typename Device>
Tensor divergence_rows(const Tensor& base, const Tensor& ablated, const Tensor& row_map, int64_t which) {
  const Device device(base);
  const Tensor map = torch::stable::contiguous(row_map);
  require(which > 0 && (which & ~shipsfast::kEveryDivergence) == 0, "expected which in 1 .. ",
          int64_t{shipsfast::kEveryDivergence}, ", got ", which);
  shipsfast::DivergenceRows rows;
  describe(base, ablated, map, rows);
  int64_t count = 0;
  for (int64_t bits = which; bits != 0; bits >>= 1) count += bits & 1;
  Tensor results = torch::stable::new_empty(base, {count, rows.num_ablated}, ScalarType::Double);
  rows.which = which;
  rows.results = static_cast<double*>(results.mutable_data_ptr());
  if (rows.num_ablated > 0) device.run(rows);
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY(shipsfast, m) {
  m.def("kl_rows(Tensor base, Tensor ablated, Tensor row_map) -> Tensor");
  m.def("divergence_rows(Tensor base, Tensor ablated, Tensor row_map, int which) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(shipsfast, CPU, m) {
  m.impl("kl_rows", TORCH_BOX(&kl_rows<Cpu>));
  m.impl("divergence_rows", TORCH_BOX(&divergence_rows<Cpu>));
}

#ifdef SHIPSFAST_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(shipsfast, CUDA, m) {
  m.impl("kl_rows", TORCH_BOX(&kl_rows<Cuda>));
  m.impl("divergence_rows", TORCH_BOX(&divergence_rows<Cuda>));
}
#endif

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "shipsfast._C", nullptr, -1, nullptr,
                                   nullptr,               nullptr,        nullptr, nullptr};
  return PyModule_Create(&definition);
}
