// The compiled code for a CPU, in every form that this processor runs, at sizes that do not fill registers, for the
// sanitizers.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "cpu/forms.h"
#include "cpu/memory.h"

namespace {

std::vector<float> random_matrix(int64_t size, std::mt19937& generator) {
  std::normal_distribution<float> normal;
  std::vector<float> matrix(size);
  for (float& entry : matrix) entry = normal(generator);
  return matrix;
}

double total(const std::vector<float>& numbers, double sum) {
  for (size_t i = 0; i < numbers.size(); ++i) sum += numbers[i] * static_cast<double>(1 + i % 7);
  return sum;
}

double refresh(int64_t d, int64_t q, int64_t members, bool summarises, int threads, std::mt19937& generator) {
  std::vector<std::vector<float>> samples, images, bases;
  for (int64_t i = 0; i < members; ++i) {
    samples.push_back(random_matrix(d * q, generator));
    images.push_back(samples.back());  // of a scatter that is the identity
    bases.emplace_back(d * q);
  }
  std::vector<double> past(members * q, 0.5), values(members * q), cosines(members * q), overlaps(members * q);
  std::vector<float> means(members * 2 * d, 0.1f), rounded(members * d * q);
  std::vector<uint8_t> solved(members);
  std::vector<eva::RefreshTask> tasks;
  for (int64_t i = 0; i < members; ++i)
    tasks.push_back({d, q, samples[i].data(), images[i].data(), samples[i].data(), past.data() + i * q,
                     means.data() + i * 2 * d, summarises, bases[i].data(), rounded.data() + i * d * q,
                     values.data() + i * q, cosines.data() + i * q, overlaps.data() + i * q});
  eva::code().refresh(tasks, {1e-6, 5e-4, 0.1, 1e-5, 1e-12, 100, 1e-12, 2}, solved.data(), threads);
  double sum = 0;
  for (int64_t i = 0; i < members; ++i) sum += solved[i];
  for (const double value : values) sum += value;
  for (const std::vector<float>& basis : bases) sum = total(basis, sum);
  return sum;
}

// Rows in bfloat16 times few columns, and their transpose.
double thin(int64_t n, int64_t d, int64_t q, const uint16_t* x, const std::vector<uint8_t>& mask,
           const std::vector<float>& basis, int threads) {
  std::vector<float> images(n * q), product(d * q);
  eva::code().project({x, n, d, d, mask.data(), basis.data(), q, images.data()}, threads);
  eva::code().outer({x, n, d, d, mask.data(), images.data(), q, product.data()}, threads);
  return total(product, total(images, 0));
}

// Entries in float32 or bfloat16, and a matrix of low rank that is added to them.
template <typename X>
double low_rank(int64_t m, int64_t n, int64_t r, int threads) {
  std::vector<X> matrix(m * n);
  for (int64_t i = 0; i < m * n; ++i) matrix[i] = static_cast<X>(std::is_same_v<X, float> ? i % 11 : 0x3f00 + i * 37 % 128);
  std::vector<double> left(m * r), right(r * n);
  for (int64_t i = 0; i < m * r; ++i) left[i] = 1.0 / (1 + i % 13);
  for (int64_t i = 0; i < r * n; ++i) right[i] = 1.0 / (1 + i % 17);
  const eva::LowRankNorms norms =
      eva::code().low_rank({matrix.data(), std::is_same_v<X, float>, m, n, r, left.data(), right.data()}, threads);
  double sum = norms.matrix + norms.rounding;
  for (int64_t i = 0; i < m * n; ++i) sum += static_cast<double>(matrix[i]) * static_cast<double>(1 + i % 7);
  return sum;
}

// All rows but every fifth, in memory that ends where they end.
template <typename X>
double products(int64_t n, int64_t d, int64_t q, int threads, std::mt19937& generator) {
  const std::vector<float> numbers = random_matrix(n * d, generator);
  std::vector<X> x(n * d);
  for (int64_t i = 0; i < n * d; ++i)
    x[i] = std::is_same_v<X, float> ? static_cast<X>(numbers[i]) : static_cast<X>(0x3f00 + i * 37 % 128);
  std::vector<uint8_t> mask(n);
  for (int64_t i = 0; i < n; ++i) mask[i] = i % 5 != 0;
  const std::vector<float> shift(d, 0.25f), basis = random_matrix(d * q, generator), signs(n, -1.0f);
  std::vector<float> product(d * q), sums(q * d), tally(q);
  std::vector<double> column_sum(d), totals(d);
  double square_sum = 0;
  eva::code().subspace({x.data(), std::is_same_v<X, float>, n, d, d, mask.data(), shift.data(), basis.data(), q, 1,
                        product.data(), column_sum.data(), &square_sum},
                       threads);
  eva::code().sketch({x.data(), std::is_same_v<X, float>, n, d, d, mask.data(), signs.data(), 256, 3, 3 % q, q,
                      sums.data(), tally.data(), totals.data()},
                     threads);
  std::vector<float> gram(d * d);
  eva::code().gram({x.data(), std::is_same_v<X, float>, n, d, d, mask.data(), shift.data(), 1, gram.data(),
                    column_sum.data(), &square_sum},
                   threads);
  double sum = total(gram, total(sums, total(product, square_sum + totals[0])));
  if constexpr (std::is_same_v<X, uint16_t>) sum += thin(n, d, q, x.data(), mask, basis, threads);
  return sum;
}

void run_all(std::mt19937& generator, double& sum) {
  const std::vector<std::pair<int64_t, int64_t>> shapes{{1, 1}, {5, 2}, {33, 7}, {64, 16}, {100, 17}, {97, 97}};
  for (const auto& [d, q] : shapes)
    for (const bool summarises : {false, true})
      for (const int threads : {1, 3}) {
        sum += refresh(d, q, 5, summarises, threads, generator);
        const std::vector<float> y = random_matrix(d * q, generator);
        std::vector<float> out(d * q);
        for (const bool transposed : {false, true})
          sum += eva::code().cholesky_qr(y.data(), transposed, d, q, out.data(), 100, threads) == eva::Orthonormal::kDone;
        std::vector<double> matrices(3 * q * q), values(3 * q), vectors(3 * q * q);
        for (int64_t i = 0; i < 3 * q * q; ++i) matrices[i] = 1.0 / (1 + i % q + i / q % q);
        std::vector<uint8_t> solved(3);
        eva::code().symmetric_eigen(matrices.data(), 3, q, values.data(), vectors.data(), solved.data(), threads);
        for (const uint8_t one : solved) sum += one;
        const int64_t count = (q + 3) / 4;
        std::vector<double> leading(3 * count), rows(3 * count * q);
        eva::code().leading_eigen(matrices.data(), 3, q, count, leading.data(), rows.data(), solved.data(), threads);
        for (const uint8_t one : solved) sum += one;
        for (const double value : leading) sum += value;
        for (const double value : values) sum += value;
        sum = total(out, sum);
      }
  for (const auto& [n, d, q] : std::vector<std::array<int64_t, 3>>{{1, 1, 1}, {70, 33, 17}, {301, 130, 16}})
    for (const int threads : {1, 3}) {
      sum += products<float>(n, d, q, threads, generator) + products<uint16_t>(n, d, q, threads, generator);
      sum += low_rank<float>(n, d, q, threads) + low_rank<uint16_t>(n, d, q, threads);
    }
}

}  // namespace

extern "C" int start_emulating();

// Prints the forms it has run: all that this processor runs, and with AVX-512 BF16 the one for AMX too, in emulated tiles.
// On the other stream a sum of what each has put out. Compiled with EVA_FILL_MEMORY it takes the byte to fill memory with.
int main([[maybe_unused]] int count, [[maybe_unused]] char** given) {
#ifdef EVA_FILL_MEMORY
  if (count > 1) eva::fill_memory = std::atoi(given[1]);
#endif
  const std::vector<std::string> here = eva::forms();
  const auto runs = [&](const std::string& form) { return std::count(here.begin(), here.end(), form) > 0; };
  for (const std::string& form : eva::built_forms()) {
    const bool emulated = form == "amx" && !runs(form) && runs("avx512bf16");
    if (!runs(form) && !emulated) continue;
    if (emulated) start_emulating();
    std::mt19937 generator(0);
    double sum = 0;
    eva::choose_form(form, emulated);
    run_all(generator, sum);
    if (!std::isfinite(sum)) return EXIT_FAILURE;
    std::puts(form.c_str());
    std::fprintf(stderr, "%a\n", sum);
  }
}
