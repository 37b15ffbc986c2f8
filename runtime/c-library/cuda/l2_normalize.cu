// L2Normalize: x [rows, D] float32 -> y [rows, D] float32, x / max(Euclidean norm, 1e-12).
#include "operators.h"
#include "rows.h"

namespace jinaclip {
namespace {

constexpr int kWidth = 4;

__device__ inline float divisor(float squares) {
  const float norm = sqrtf(squares);
  return norm < 1e-12f ? 1e-12f : norm;  // NaN stays NaN
}

template <int Threads, int Groups>
__global__ void l2_normalize_kernel(const float* x, float* __restrict__ y, int64_t rows, int columns) {
  begin_kernel();
  const int64_t row = row_index();
  if (row >= rows) {
    return;
  }
  const int lane = threadIdx.x;
  x += row * columns;                 // [D]
  y += row * columns;                 // [D]
  float values[Groups][kWidth] = {};  // [Groups, Width] of this thread
#pragma unroll
  for (int g = 0; g < Groups; ++g) {
    const int column = (g * Threads + lane) * kWidth;
    if (column < columns) {
      load(x + column, values[g]);
    }
  }
  const float factor = 1.0f / divisor(row_sum<Threads, 0>(sum_of_squares(values)));
#pragma unroll
  for (int g = 0; g < Groups; ++g) {
    const int column = (g * Threads + lane) * kWidth;
    if (column < columns) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        values[g][i] *= factor;
      }
      store(y + column, values[g]);
    }
  }
}

__global__ void l2_normalize_wide_kernel(const float* x, float* __restrict__ y, int columns) {
  begin_kernel();
  x += static_cast<int64_t>(blockIdx.x) * columns;
  y += static_cast<int64_t>(blockIdx.x) * columns;
  float squares = 0.0f;
  for (int column = threadIdx.x; column < columns; column += kWideThreads) {
    squares += x[column] * x[column];
  }
  const float norm = divisor(row_sum<kWideThreads, 0>(squares));
  for (int column = threadIdx.x; column < columns; column += kWideThreads) {
    y[column] = x[column] / norm;
  }
}

}  // namespace

void l2_normalize(const float* x, float* y, int64_t rows, int columns, Stream stream) {
  choose_row_shape<kWidth>(
      rows, columns, columns % kWidth == 0 && aligned(x) && aligned(y),
      [&](auto shape) {
        constexpr int threads = decltype(shape)::Threads;
        const RowGrid g = row_grid<threads>(rows);
        launch(l2_normalize_kernel<threads, decltype(shape)::Groups>, g.grid, g.block, stream, x, y, rows, columns);
      },
      [&] {
        launch(l2_normalize_wide_kernel, dim3(static_cast<unsigned>(rows)), dim3(kWideThreads), stream, x, y, columns);
      });
}

}  // namespace jinaclip
