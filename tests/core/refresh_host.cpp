// The compiled refresh at sizes that do not fill registers, for the sanitizers: prints a sum of what came out.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../../csrc/cpu/refresh.h"
#include "../../csrc/cpu/symmetric_eigen.h"

namespace {

std::vector<float> random_matrix(int64_t size, std::mt19937& generator) {
  std::normal_distribution<float> normal;
  std::vector<float> matrix(size);
  for (float& entry : matrix) entry = normal(generator);
  return matrix;
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
  eva::refresh(tasks, {1e-6, 5e-4, 1e-5, 1e-12, 100, 1e-12, 2}, solved.data(), threads);
  double sum = 0;
  for (int64_t i = 0; i < members; ++i) sum += solved[i];
  return sum;
}

}  // namespace

int main() {
  if (!eva::has_refresh()) return EXIT_SUCCESS;
  std::mt19937 generator(0);
  double sum = 0;
  const std::vector<std::pair<int64_t, int64_t>> shapes{{1, 1}, {5, 2}, {33, 7}, {64, 16}, {100, 17}, {97, 97}};
  for (const auto& [d, q] : shapes)
    for (const bool summarises : {false, true})
      for (const int threads : {1, 3}) {
        sum += refresh(d, q, 5, summarises, threads, generator);
        const std::vector<float> y = random_matrix(d * q, generator);
        std::vector<float> out(d * q);
        sum += eva::cholesky_qr(y.data(), d, q, out.data(), 100, threads) == eva::Orthonormal::kDone;
        std::vector<double> matrices(3 * q * q), values(3 * q), vectors(3 * q * q);
        for (int64_t i = 0; i < 3 * q * q; ++i) matrices[i] = 1.0 / (1 + i % q + i / q % q);
        std::vector<uint8_t> solved(3);
        eva::symmetric_eigen_of_all(matrices.data(), 3, q, values.data(), vectors.data(), solved.data(), threads);
        for (const uint8_t one : solved) sum += one;
      }
  std::printf("%.3f\n", sum);
}
