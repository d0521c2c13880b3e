// Dense matrices for AVX-512: products by tiles of registers. All matrices are row-major, and their rows are padded
// with zeros to whole registers; `stride` is the padded width.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__) && (__GNUC__ >= 11 || defined(__clang__))
#define EVA_DENSE 1

#include <immintrin.h>

#include <algorithm>

#define EVA_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))

namespace eva {

template <typename T>
struct Register;

template <>
struct Register<float> {
  using Type = __m512;
  static constexpr int64_t kLanes = 16;
  EVA_AVX512 static Type zero() { return _mm512_setzero_ps(); }
  EVA_AVX512 static Type all(float value) { return _mm512_set1_ps(value); }
  EVA_AVX512 static Type load(const float* from) { return _mm512_loadu_ps(from); }
  EVA_AVX512 static void store(float* to, Type value) { _mm512_storeu_ps(to, value); }
  EVA_AVX512 static Type add(Type a, Type b) { return _mm512_add_ps(a, b); }
  EVA_AVX512 static Type mul(Type a, Type b) { return _mm512_mul_ps(a, b); }
  EVA_AVX512 static Type fma(Type a, Type b, Type c) { return _mm512_fmadd_ps(a, b, c); }  // a b + c
  EVA_AVX512 static float sum(Type a) {
    alignas(64) float lanes[kLanes];
    store(lanes, a);
    for (int64_t half = kLanes / 2; half > 0; half /= 2)
      for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
  }
};

template <>
struct Register<double> {
  using Type = __m512d;
  static constexpr int64_t kLanes = 8;
  EVA_AVX512 static Type zero() { return _mm512_setzero_pd(); }
  EVA_AVX512 static Type all(double value) { return _mm512_set1_pd(value); }
  EVA_AVX512 static Type load(const double* from) { return _mm512_loadu_pd(from); }
  EVA_AVX512 static void store(double* to, Type value) { _mm512_storeu_pd(to, value); }
  EVA_AVX512 static Type add(Type a, Type b) { return _mm512_add_pd(a, b); }
  EVA_AVX512 static Type mul(Type a, Type b) { return _mm512_mul_pd(a, b); }
  EVA_AVX512 static Type fma(Type a, Type b, Type c) { return _mm512_fmadd_pd(a, b, c); }
  EVA_AVX512 static double sum(Type a) {
    alignas(64) double lanes[kLanes];
    store(lanes, a);
    return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
  }
};

constexpr int64_t padded(int64_t width) { return (width + 15) / 16 * 16; }

// A left factor: entry (i, k) is data[i * step_i + k * step_k], so that a transpose is a matter of steps.
template <typename T>
struct Left {
  const T* data;
  int64_t step_i, step_k;
};

// to(i, c) (+)= Σ_k left(i, k) right(k, c) for Tall rows and Wide registers.
template <typename T, int Tall, int Wide>
EVA_AVX512 void multiply_tile(Left<T> left, const T* right, int64_t right_stride, int64_t depth, T* to, int64_t stride,
                              bool adds) {
  using R = Register<T>;
  typename R::Type sum[Tall][Wide];
  for (int i = 0; i < Tall; ++i)
    for (int v = 0; v < Wide; ++v) sum[i][v] = adds ? R::load(to + i * stride + v * R::kLanes) : R::zero();
  for (int64_t k = 0; k < depth; ++k) {
    typename R::Type row[Wide];
    for (int v = 0; v < Wide; ++v) row[v] = R::load(right + k * right_stride + v * R::kLanes);
    for (int i = 0; i < Tall; ++i) {
      const typename R::Type factor = R::all(left.data[i * left.step_i + k * left.step_k]);
      for (int v = 0; v < Wide; ++v) sum[i][v] = R::fma(factor, row[v], sum[i][v]);
    }
  }
  for (int i = 0; i < Tall; ++i)
    for (int v = 0; v < Wide; ++v) R::store(to + i * stride + v * R::kLanes, sum[i][v]);
}

template <typename T, int Tall>
EVA_AVX512 inline void multiply_rows(Left<T> left, const T* right, int64_t right_stride, int64_t depth, T* to,
                                     int64_t stride, int64_t registers, bool adds) {
  constexpr int64_t kWide = 6;
  constexpr decltype(&multiply_tile<T, Tall, 1>) kTiles[] = {
      multiply_tile<T, Tall, 1>, multiply_tile<T, Tall, 2>, multiply_tile<T, Tall, 3>,
      multiply_tile<T, Tall, 4>, multiply_tile<T, Tall, 5>, multiply_tile<T, Tall, 6>};
  for (int64_t tiles = (registers + kWide - 1) / kWide; tiles > 0; --tiles) {  // about as wide as each other
    const int64_t wide = (registers + tiles - 1) / tiles, lanes = wide * Register<T>::kLanes;
    kTiles[wide - 1](left, right, right_stride, depth, to, stride, adds);
    registers -= wide, right += lanes, to += lanes;
  }
}

// Whole tiles, or of a product that is symmetric only those that are not left of the diagonal.
enum class Part { kWhole, kUpper };

// to (+)= left · right, (m × k) · (k × n).
template <typename T, Part part = Part::kWhole>
EVA_AVX512 void multiply(Left<T> left, const T* right, int64_t right_stride, T* to, int64_t stride, int64_t m,
                         int64_t n, int64_t k, bool adds = false) {
  constexpr int64_t kLanes = Register<T>::kLanes;
  constexpr int64_t kTall = 4;    // rows and registers of a tile: 24 of the 32 registers
  constexpr int64_t kDepth = 96;  // so much of the right factor stays in the first-level cache
  const int64_t registers = (n + kLanes - 1) / kLanes;
  for (int64_t start = 0; start < k || start == 0; start += kDepth) {
    const int64_t depth = std::min(kDepth, k - start);
    for (int64_t i = 0; i < m;) {
      const int64_t before = part == Part::kUpper ? i / kLanes : 0, lanes = before * kLanes;
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
EVA_AVX512 void multiply_symmetric(Left<T> left, const T* right, int64_t right_stride, T* to, int64_t stride,
                                   int64_t m, int64_t k) {
  multiply<T, Part::kUpper>(left, right, right_stride, to, stride, m, m, k);
  for (int64_t i = 1; i < m; ++i)
    for (int64_t j = 0; j < i; ++j) to[i * stride + j] = to[j * stride + i];
}

// Σ_j x(j) y(j) over whole registers from `begin` to `end`.
template <typename T>
EVA_AVX512 T dot(const T* x, const T* y, int64_t begin, int64_t end) {
  using R = Register<T>;
  typename R::Type sum = R::zero();
  for (int64_t j = begin; j < end; j += R::kLanes) sum = R::fma(R::load(x + j), R::load(y + j), sum);
  return R::sum(sum);
}

// to(j) += factor · from(j), likewise.
EVA_AVX512 inline void add_scaled(double factor, const double* from, double* to, int64_t begin, int64_t end) {
  using R = Register<double>;
  const R::Type all = R::all(factor);
  for (int64_t j = begin; j < end; j += R::kLanes) R::store(to + j, R::fma(all, R::load(from + j), R::load(to + j)));
}

}  // namespace eva

#endif
