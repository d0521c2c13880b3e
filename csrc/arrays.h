// NumPy arrays for the files that face Python.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace py = pybind11;

// Row-major and aligned: what is not is copied on its way in, what would lose something in the conversion refused.
template <typename T>
using Array = py::array_t<T, py::array::c_style | py::detail::npy_api::NPY_ARRAY_ALIGNED_>;
using Integers = Array<int64_t>;

template <typename T>
std::vector<T> to_vector(const Array<T>& array) {
  return std::vector<T>(array.data(), array.data() + array.size());
}

template <typename T>
void require_shape(const char* name, const Array<T>& array, const std::vector<int64_t>& shape) {
  if (!std::equal(shape.begin(), shape.end(), array.shape(), array.shape() + array.ndim())) {
    std::string expected;
    for (const int64_t size : shape) expected += (expected.empty() ? "" : ", ") + std::to_string(size);
    throw std::invalid_argument(std::string(name) + ": expected an array of shape (" + expected + ")");
  }
}

template <typename T>
Array<T> to_array(const std::vector<T>& values, std::vector<py::ssize_t> shape) {
  Array<T> array(std::move(shape));
  std::copy(values.begin(), values.end(), array.mutable_data());
  return array;
}

template <typename T>
Array<T> to_array(const std::vector<T>& values) {
  return to_array(values, {static_cast<py::ssize_t>(values.size())});
}
