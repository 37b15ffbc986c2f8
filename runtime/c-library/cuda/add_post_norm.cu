// AddPostNorm: residual [rows, D] or [D], float16 or float32, delta [rows, D] float16 -> y [rows, D] float16, the norm of
// their sum. For post-norm blocks, whose residual is the norm before. One read of each input, one write of y.
#include "operators.h"
#include "rows.h"

namespace jinaclip {
namespace {

constexpr int kWidth = 8;

template <typename Residual, int Threads, int Groups>
__global__ void add_post_norm_kernel(const Residual* residual, int64_t residual_stride,
                                     const __half* delta, const float* __restrict__ gain,
                                     const float* __restrict__ bias, __half* __restrict__ y, int64_t rows, int columns,
                                     float epsilon) {
  begin_kernel();
  const int64_t row = row_index();
  if (row >= rows) {
    return;
  }
  const int lane = threadIdx.x;
  residual += row * residual_stride;  // [D]
  delta += row * columns;             // [D]
  y += row * columns;                 // [D]
  float values[Groups][kWidth] = {};  // [Groups, Width] of this thread, like the next
  float deltas[Groups][kWidth] = {};
#pragma unroll
  for (int g = 0; g < Groups; ++g) {
    const int column = (g * Threads + lane) * kWidth;
    if (column < columns) {
      load(residual + column, values[g]);
      load(delta + column, deltas[g]);
    }
  }
  GainAndBias<Threads, Groups, kWidth> gain_and_bias(gain, bias, lane, columns);
#pragma unroll
  for (int g = 0; g < Groups; ++g) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      values[g][i] += deltas[g][i];
    }
  }
  normalise<Threads>(values, lane, columns, epsilon);
#pragma unroll
  for (int g = 0; g < Groups; ++g) {
    const int column = (g * Threads + lane) * kWidth;
    gain_and_bias.apply(g, values[g]);
    if (column < columns) {
      store(y + column, values[g]);
    }
  }
}

template <typename Residual>
__global__ void add_post_norm_wide_kernel(const Residual* residual, int64_t residual_stride,
                                          const __half* delta, const float* __restrict__ gain,
                                          const float* __restrict__ bias, __half* __restrict__ y, int columns,
                                          float epsilon) {
  begin_kernel();
  residual += blockIdx.x * residual_stride;
  delta += static_cast<int64_t>(blockIdx.x) * columns;
  y += static_cast<int64_t>(blockIdx.x) * columns;
  normalise_wide<kWideThreads>(
      threadIdx.x, columns, epsilon,
      [=](int column) { return to_float(residual[column]) + to_float(delta[column]); },
      [=](int column, float normed) { from_float(normed * gain[column] + bias[column], y[column]); });
}

template <typename Residual>
void add_post_norm_of(const Residual* residual, int64_t residual_stride, const __half* delta, const float* gain,
                      const float* bias, __half* y, int64_t rows, int columns, float epsilon, Stream stream) {
  const bool vectors = columns % kWidth == 0 && aligned(residual) && aligned(delta) && aligned(gain) &&
                       aligned(bias) && aligned(y);
  choose_row_shape<kWidth>(
      rows, columns, vectors,
      [&](auto shape) {
        constexpr int threads = decltype(shape)::Threads;
        const RowGrid g = row_grid<threads>(rows);
        launch(add_post_norm_kernel<Residual, threads, decltype(shape)::Groups>, g.grid, g.block, stream, residual,
               residual_stride, delta, gain, bias, y, rows, columns, epsilon);
      },
      [&] {
        launch(add_post_norm_wide_kernel<Residual>, dim3(static_cast<unsigned>(rows)), dim3(kWideThreads), stream,
               residual, residual_stride, delta, gain, bias, y, columns, epsilon);
      });
}

}  // namespace

void add_post_norm(const void* residual, bool residual_is_float32, bool one_residual, const Half* delta,
                   const float* gain, const float* bias, Half* y, int64_t rows, int columns, float epsilon,
                   Stream stream) {
  const __half* in = static_cast<const __half*>(delta);
  __half* out = static_cast<__half*>(y);
  const int64_t stride = one_residual ? 0 : columns;
  if (residual_is_float32) {
    add_post_norm_of(static_cast<const float*>(residual), stride, in, gain, bias, out, rows, columns, epsilon, stream);
  } else {
    add_post_norm_of(static_cast<const __half*>(residual), stride, in, gain, bias, out, rows, columns, epsilon,
                     stream);
  }
}

}  // namespace jinaclip
