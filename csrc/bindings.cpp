// The Python face of the module. Ranges of arguments are checked by eva_kernels.allocation and eva_kernels.convergence;
// types and shapes, on which it depends what memory is read, here too.
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>

#include "allocation.h"
#include "arguments.h"
#include "arrays.h"
#include "tracker.h"

void bind_cpu(py::module_& module);
#ifdef EVA_CUDA
void bind_cuda(py::module_& module);
#endif

namespace {

Array<bool> to_flags(const std::vector<uint8_t>& values) {
  Array<bool> array(static_cast<py::ssize_t>(values.size()));
  for (size_t i = 0; i < values.size(); ++i) array.mutable_data()[i] = values[i] != 0;
  return array;
}

eva::Demands demands(const Integers& candidates, int64_t budget, const std::optional<Integers>& groups,
                     int64_t min_rank, std::optional<int64_t> max_rank, int64_t rank_multiple,
                     const std::optional<Integers>& divisors) {
  eva::Demands demands;
  demands.candidates = to_vector(candidates);
  const int64_t sites = candidates.size();
  require_shape("candidates", candidates, {sites});
  if (groups) {
    require_shape("groups", *groups, {sites});
    demands.groups = to_vector(*groups);
    for (const int64_t label : demands.groups) eva::require_below("groups", label, sites);
  }
  if (divisors) {
    require_shape("divisors", *divisors, {sites});
    demands.divisors = to_vector(*divisors);
    for (const int64_t divisor : demands.divisors) eva::require_at_least("divisors", divisor, 1);
  }
  eva::require_at_least("rank_multiple", rank_multiple, 1);
  demands.budget = budget;
  demands.min_rank = min_rank;
  demands.max_rank = max_rank;
  demands.rank_multiple = rank_multiple;
  return demands;
}

// A row for each site.
void require_rows(const char* name, const Array<double>& array, int64_t sites) {
  if (array.ndim() != 2 || array.shape(0) != sites)
    throw std::invalid_argument(std::string(name) + ": expected a matrix of " + std::to_string(sites) + " rows");
}

void require_columns(const Array<double>& ratios, const std::vector<int64_t>& upper) {
  for (size_t i = 0; i < upper.size(); ++i)
    if (upper[i] > ratios.shape(1))
      throw std::invalid_argument("ratios: expected at least the " + std::to_string(upper[i]) +
                                  " columns that site " + std::to_string(i) + " may take, got " +
                                  std::to_string(ratios.shape(1)));
}

Integers allocate_ranks(const Array<double>& ratios, const Integers& candidates, int64_t budget,
                        const std::optional<Integers>& groups, int64_t min_rank, std::optional<int64_t> max_rank,
                        int64_t rank_multiple, const std::optional<Integers>& divisors) {
  eva::Allocator allocator(demands(candidates, budget, groups, min_rank, max_rank, rank_multiple, divisors));
  require_rows("ratios", ratios, allocator.sites());
  require_columns(ratios, allocator.upper());
  Integers ranks(static_cast<py::ssize_t>(allocator.sites()));
  const double* from = ratios.data();
  int64_t* to = ranks.mutable_data();
  const int64_t stride = ratios.shape(1);
  py::gil_scoped_release unlocked;
  allocator.allocate(from, stride, to);
  return ranks;
}

eva::Criterion criterion(const std::string& name) {
  if (name == "component") return eva::Criterion::kComponent;
  if (name == "subspace") return eva::Criterion::kSubspace;
  return eva::Criterion::kCaptured;
}

py::tuple to_tuple(const eva::Decision& decision) {
  return py::make_tuple(to_array(decision.ranks), to_array(decision.components_converged),
                        to_flags(decision.done), to_flags(decision.reopened));
}

py::tuple update(eva::Tracker& tracker, const Array<double>& evidence, const Array<double>& ratios,
                 const Array<bool>& updated) {
  static_assert(sizeof(bool) == sizeof(uint8_t));
  require_rows("evidence", evidence, tracker.sites());
  require_rows("ratios", ratios, tracker.sites());
  eva::require_at_least("evidence", evidence.shape(1), tracker.columns());
  eva::require_at_least("ratios", ratios.shape(1), tracker.columns());
  require_shape("updated", updated, {tracker.sites()});
  const double *e = evidence.data(), *r = ratios.data();
  const int64_t e_stride = evidence.shape(1), r_stride = ratios.shape(1);
  const uint8_t* u = reinterpret_cast<const uint8_t*>(updated.data());
  eva::Decision decision;
  {
    py::gil_scoped_release unlocked;
    decision = tracker.update(e, e_stride, r, r_stride, u);
  }
  return to_tuple(decision);
}

py::tuple decision(eva::Tracker& tracker) {
  eva::Decision decision;
  {
    py::gil_scoped_release unlocked;
    decision = tracker.decision();
  }
  return to_tuple(decision);
}

py::dict state(eva::Tracker& tracker) {
  const eva::TrackerState state = tracker.state();
  const std::vector<py::ssize_t> shape{tracker.sites(), tracker.columns()};
  py::dict result;
  result["ratios"] = to_array(state.ratios, shape);
  result["streaks"] = to_array(state.streaks, shape);
  result["refreshes"] = to_array(state.refreshes);
  result["latched"] = to_array(state.latched);
  return result;
}

void restore(eva::Tracker& tracker, const Array<double>& ratios, const Array<uint8_t>& streaks,
             const Integers& refreshes, const Integers& latched) {
  require_shape("ratios", ratios, {tracker.sites(), tracker.columns()});
  require_shape("streaks", streaks, {tracker.sites(), tracker.columns()});
  require_shape("refreshes", refreshes, {tracker.sites()});
  require_shape("latched", latched, {tracker.sites()});
  tracker.restore({to_vector(ratios), to_vector(streaks), to_vector(refreshes), to_vector(latched)});
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  using namespace pybind11::literals;
  module.doc() = "Rank allocation and convergence tracking over all sites, in C++.";
  module.attr("cplusplus") = static_cast<int64_t>(__cplusplus);
  bind_cpu(module);
#ifdef EVA_CUDA
  bind_cuda(module);
#endif
  module.def("allocate_ranks", &allocate_ranks, "ratios"_a, "candidates"_a, "budget"_a, "groups"_a, "min_rank"_a,
             "max_rank"_a, "rank_multiple"_a, "divisors"_a);
  py::class_<eva::Tracker>(module, "Tracker")
      .def(py::init([](const Integers& candidates, int64_t budget, const std::optional<Integers>& groups,
                       int64_t min_rank, std::optional<int64_t> max_rank, int64_t rank_multiple,
                       const std::optional<Integers>& divisors, double tau, const std::string& name) {
             return std::make_unique<eva::Tracker>(
                 demands(candidates, budget, groups, min_rank, max_rank, rank_multiple, divisors), tau,
                 criterion(name));
           }),
           "candidates"_a, "budget"_a, "groups"_a, "min_rank"_a, "max_rank"_a, "rank_multiple"_a, "divisors"_a,
           "tau"_a, "criterion"_a)
      .def_property_readonly("sites", &eva::Tracker::sites)
      .def_property_readonly("columns", &eva::Tracker::columns)
      .def("update", &update, "evidence"_a, "ratios"_a, "updated"_a)
      .def("decision", &decision)
      .def("state", &state)
      .def("restore", &restore, "ratios"_a, "streaks"_a, "refreshes"_a, "latched"_a);
}
