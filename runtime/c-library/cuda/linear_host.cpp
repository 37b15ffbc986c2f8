// Linear on the host: y [m, n] float16 = x [m, k] weight [k, n] + bias [n], float32 sums, for tests.
#include <algorithm>
#include <cstring>

#include "operators.h"

namespace jinaclip {

struct Linear::State {};

Linear::Linear() = default;
Linear::~Linear() = default;

void Linear::run(const Half* x, const Half* weight, const Half* bias, Half* y, int64_t m, int n, int k, Stream) {
  constexpr int kRows = 4;
  constexpr int kColumns = 64;
  const auto* xs = static_cast<const _Float16*>(x);
  const auto* weights = static_cast<const _Float16*>(weight);
  const auto* biases = static_cast<const _Float16*>(bias);
  auto* ys = static_cast<_Float16*>(y);
  for (int64_t row = 0; row < m; row += kRows) {
    const int rows = static_cast<int>(std::min<int64_t>(kRows, m - row));
    for (int column = 0; column < n; column += kColumns) {
      const int columns = std::min(kColumns, n - column);
      float sums[kRows][kColumns] = {};
      for (int i = 0; i < k; ++i) {
        float w[kColumns] = {};
        for (int c = 0; c < columns; ++c) {
          w[c] = static_cast<float>(weights[static_cast<int64_t>(i) * n + column + c]);
        }
        for (int r = 0; r < rows; ++r) {
          const float a = static_cast<float>(xs[(row + r) * k + i]);
          for (int c = 0; c < kColumns; ++c) {
            sums[r][c] += a * w[c];
          }
        }
      }
      for (int r = 0; r < rows; ++r) {
        for (int c = 0; c < columns; ++c) {
          const float added = biases == nullptr ? 0.0f : static_cast<float>(biases[column + c]);
          ys[(row + r) * n + column + c] = static_cast<_Float16>(sums[r][c] + added);
        }
      }
    }
  }
}

}  // namespace jinaclip
