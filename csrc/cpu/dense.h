// Dense matrices, for the form that includes this: products by tiles of registers. All matrices are row-major, and their
// rows are padded to `padded` widths; `stride` is the padded width. Padding of factors is zero. That of products is too in
// their last register; what lies beyond it is not written, and must not be read for what it says.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

namespace eva::EVA_FORM {

template <typename T>
struct Register;

#if EVA_REGISTER_BYTES == 64

constexpr int64_t kTall = 4, kWide = 6;  // rows and registers of a tile: 24 of the 32 registers

template <>
struct Register<float> {
  using Type = __m512;
  EVA_TARGET static Type zero() { return _mm512_setzero_ps(); }
  EVA_TARGET static Type all(float value) { return _mm512_set1_ps(value); }
  EVA_TARGET static Type load(const float* from) { return _mm512_loadu_ps(from); }
  EVA_TARGET static void store(float* to, Type value) { _mm512_storeu_ps(to, value); }
  EVA_TARGET static Type mul(Type a, Type b) { return _mm512_mul_ps(a, b); }
  EVA_TARGET static Type fma(Type a, Type b, Type c) { return _mm512_fmadd_ps(a, b, c); }  // a b + c
};

template <>
struct Register<double> {
  using Type = __m512d;
  EVA_TARGET static Type zero() { return _mm512_setzero_pd(); }
  EVA_TARGET static Type all(double value) { return _mm512_set1_pd(value); }
  EVA_TARGET static Type load(const double* from) { return _mm512_loadu_pd(from); }
  EVA_TARGET static void store(double* to, Type value) { _mm512_storeu_pd(to, value); }
  EVA_TARGET static Type mul(Type a, Type b) { return _mm512_mul_pd(a, b); }
  EVA_TARGET static Type fma(Type a, Type b, Type c) { return _mm512_fmadd_pd(a, b, c); }
};

#else

constexpr int64_t kTall = 4, kWide = 3;  // 12 of the 16 registers

template <>
struct Register<float> {
  using Type = __m256;
  EVA_TARGET static Type zero() { return _mm256_setzero_ps(); }
  EVA_TARGET static Type all(float value) { return _mm256_set1_ps(value); }
  EVA_TARGET static Type load(const float* from) { return _mm256_loadu_ps(from); }
  EVA_TARGET static void store(float* to, Type value) { _mm256_storeu_ps(to, value); }
  EVA_TARGET static Type mul(Type a, Type b) { return _mm256_mul_ps(a, b); }
  EVA_TARGET static Type fma(Type a, Type b, Type c) { return _mm256_fmadd_ps(a, b, c); }  // a b + c
};

template <>
struct Register<double> {
  using Type = __m256d;
  EVA_TARGET static Type zero() { return _mm256_setzero_pd(); }
  EVA_TARGET static Type all(double value) { return _mm256_set1_pd(value); }
  EVA_TARGET static Type load(const double* from) { return _mm256_loadu_pd(from); }
  EVA_TARGET static void store(double* to, Type value) { _mm256_storeu_pd(to, value); }
  EVA_TARGET static Type mul(Type a, Type b) { return _mm256_mul_pd(a, b); }
  EVA_TARGET static Type fma(Type a, Type b, Type c) { return _mm256_fmadd_pd(a, b, c); }
};

#endif

template <typename T>
constexpr int64_t kLanes = EVA_REGISTER_BYTES / static_cast<int64_t>(sizeof(T));

// Pairs of lanes that are half a register apart, then those a quarter apart, and so on.
template <typename T>
EVA_TARGET T sum_of(typename Register<T>::Type value) {
  alignas(EVA_REGISTER_BYTES) T lanes[kLanes<T>];
  Register<T>::store(lanes, value);
  for (int64_t half = kLanes<T> / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

constexpr int64_t padded(int64_t width) { return (width + 15) / 16 * 16; }

// A left factor: entry (i, k) is data[i * step_i + k * step_k], so that a transpose is a matter of steps.
template <typename T>
struct Left {
  const T* data;
  int64_t step_i, step_k;
};

// to(i, c) (+)= Σ_k left(i, k) right(k, c) for Tall rows and Wide registers.
template <typename T, int Tall, int Wide>
EVA_TARGET void multiply_tile(Left<T> left, const T* right, int64_t right_stride, int64_t depth, T* to, int64_t stride,
                              bool adds) {
  using R = Register<T>;
  typename R::Type sum[Tall][Wide];
  for (int i = 0; i < Tall; ++i)
    for (int v = 0; v < Wide; ++v) sum[i][v] = adds ? R::load(to + i * stride + v * kLanes<T>) : R::zero();
  for (int64_t k = 0; k < depth; ++k) {
    typename R::Type row[Wide];
    for (int v = 0; v < Wide; ++v) row[v] = R::load(right + k * right_stride + v * kLanes<T>);
    for (int i = 0; i < Tall; ++i) {
      const typename R::Type factor = R::all(left.data[i * left.step_i + k * left.step_k]);
      for (int v = 0; v < Wide; ++v) sum[i][v] = R::fma(factor, row[v], sum[i][v]);
    }
  }
  for (int i = 0; i < Tall; ++i)
    for (int v = 0; v < Wide; ++v) R::store(to + i * stride + v * kLanes<T>, sum[i][v]);
}

template <typename T, int Tall, size_t... Less>
constexpr auto tiles(std::index_sequence<Less...>) {
  return std::array{&multiply_tile<T, Tall, static_cast<int>(Less) + 1>...};
}

template <typename T, int Tall>
EVA_TARGET inline void multiply_rows(Left<T> left, const T* right, int64_t right_stride, int64_t depth, T* to,
                                     int64_t stride, int64_t registers, bool adds) {
  constexpr auto kTiles = tiles<T, Tall>(std::make_index_sequence<kWide>());
  for (int64_t tiles = (registers + kWide - 1) / kWide; tiles > 0; --tiles) {  // about as wide as each other
    const int64_t wide = (registers + tiles - 1) / tiles, lanes = wide * kLanes<T>;
    kTiles[wide - 1](left, right, right_stride, depth, to, stride, adds);
    registers -= wide, right += lanes, to += lanes;
  }
}

// Whole tiles, or of a product that is symmetric only those that are not left of the diagonal.
enum class Part { kWhole, kUpper };

// to (+)= left · right, (m × k) · (k × n).
template <typename T, Part part = Part::kWhole>
EVA_TARGET void multiply(Left<T> left, const T* right, int64_t right_stride, T* to, int64_t stride, int64_t m,
                         int64_t n, int64_t k, bool adds = false) {
  constexpr int64_t kDepth = 96;  // so much of the right factor stays in the first-level cache
  const int64_t registers = (n + kLanes<T> - 1) / kLanes<T>;
  for (int64_t start = 0; start < k || start == 0; start += kDepth) {
    const int64_t depth = std::min(kDepth, k - start);
    for (int64_t i = 0; i < m;) {
      const int64_t before = part == Part::kUpper ? i / kLanes<T> : 0, lanes = before * kLanes<T>;
      const Left<T> rows{left.data + i * left.step_i + start * left.step_k, left.step_i, left.step_k};
      const bool is_whole = i + kTall <= m;
      (is_whole ? multiply_rows<T, kTall> : multiply_rows<T, 1>)(rows, right + start * right_stride + lanes,
                                                                 right_stride, depth, to + i * stride + lanes, stride,
                                                                 registers - before, adds || start);
      i += is_whole ? kTall : 1;
    }
  }
}

// to = left · right, (m × k) · (k × m), where that is symmetric.
template <typename T>
EVA_TARGET void multiply_symmetric(Left<T> left, const T* right, int64_t right_stride, T* to, int64_t stride,
                                   int64_t m, int64_t k) {
  multiply<T, Part::kUpper>(left, right, right_stride, to, stride, m, m, k);
  for (int64_t i = 1; i < m; ++i)
    for (int64_t j = 0; j < i; ++j) to[i * stride + j] = to[j * stride + i];
}

// Σ_j x(j) y(j) over whole registers from `begin` to `end`.
template <typename T>
EVA_TARGET T dot(const T* x, const T* y, int64_t begin, int64_t end) {
  using R = Register<T>;
  typename R::Type sum = R::zero();
  for (int64_t j = begin; j < end; j += kLanes<T>) sum = R::fma(R::load(x + j), R::load(y + j), sum);
  return sum_of<T>(sum);
}

// to(j) += factor · from(j), likewise.
EVA_TARGET inline void add_scaled(double factor, const double* from, double* to, int64_t begin, int64_t end) {
  using R = Register<double>;
  const R::Type all = R::all(factor);
  for (int64_t j = begin; j < end; j += kLanes<double>) R::store(to + j, R::fma(all, R::load(from + j), R::load(to + j)));
}

}  // namespace eva::EVA_FORM
