// AddLayerNorm: residual [rows, D] float32, delta [rows, D] float16 -> s [rows, D] float32, y [rows, D] float16.
// s is the sum (pre-norm blocks), or with keep_norm the norm of the sum (post-norm blocks). Each tensor is read or
// written once. Groups of four columns: 16 bytes of float32, 8 of float16, both contiguous over a warp.
#include "operators.h"
#include "rows.h"

namespace jinaclip {
namespace {

constexpr int kWidth = 4;

template <int Threads, int Groups, bool KeepNorm>
__global__ void add_layer_norm_kernel(const float* residual, const __half* delta,
                                      const float* __restrict__ gain, const float* __restrict__ bias,
                                      float* __restrict__ s, __half* __restrict__ y, int64_t rows, int columns,
                                      float epsilon) {
  begin_kernel();
  const int64_t row = row_index();
  if (row >= rows) {
    return;
  }
  const int lane = threadIdx.x;
  residual += row * columns;          // [D]
  delta += row * columns;             // [D]
  s += row * columns;                 // [D]
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
    const int column = (g * Threads + lane) * kWidth;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      values[g][i] += deltas[g][i];
    }
    if (!KeepNorm && column < columns) {
      store(s + column, values[g]);
    }
  }
  normalise<Threads>(values, lane, columns, epsilon);
#pragma unroll
  for (int g = 0; g < Groups; ++g) {
    const int column = (g * Threads + lane) * kWidth;
    gain_and_bias.apply(g, values[g]);
    if (column < columns) {
      if (KeepNorm) {
        store(s + column, values[g]);
      }
      store(y + column, values[g]);
    }
  }
}

template <bool KeepNorm>
__global__ void add_layer_norm_wide_kernel(const float* residual, const __half* delta,
                                           const float* __restrict__ gain, const float* __restrict__ bias,
                                           float* __restrict__ s, __half* __restrict__ y, int columns, float epsilon) {
  begin_kernel();
  const int64_t offset = static_cast<int64_t>(blockIdx.x) * columns;
  normalise_wide<kWideThreads>(
      threadIdx.x, columns, epsilon,
      [=](int column) { return residual[offset + column] + to_float(delta[offset + column]); },
      [=](int column, float normed) {
        const int64_t at = offset + column;
        const float result = normed * gain[column] + bias[column];
        s[at] = KeepNorm ? result : residual[at] + to_float(delta[at]);
        from_float(result, y[at]);
      });
}

template <bool KeepNorm>
void add_layer_norm_of(const float* residual, const __half* delta, const float* gain, const float* bias, float* s,
                       __half* y, int64_t rows, int columns, float epsilon, Stream stream) {
  const bool vectors = columns % kWidth == 0 && aligned(residual) && aligned(delta) && aligned(gain) &&
                       aligned(bias) && aligned(s) && aligned(y);
  choose_row_shape<kWidth>(
      rows, columns, vectors,
      [&](auto shape) {
        constexpr int threads = decltype(shape)::Threads;
        const RowGrid g = row_grid<threads>(rows);
        launch(add_layer_norm_kernel<threads, decltype(shape)::Groups, KeepNorm>, g.grid, g.block, stream, residual,
               delta, gain, bias, s, y, rows, columns, epsilon);
      },
      [&] {
        launch(add_layer_norm_wide_kernel<KeepNorm>, dim3(static_cast<unsigned>(rows)), dim3(kWideThreads), stream,
               residual, delta, gain, bias, s, y, columns, epsilon);
      });
}

}  // namespace

void add_layer_norm(const float* residual, const Half* delta, const float* gain, const float* bias, float* s, Half* y,
                    int64_t rows, int columns, float epsilon, bool keep_norm, Stream stream) {
  const auto of = keep_norm ? add_layer_norm_of<true> : add_layer_norm_of<false>;
  of(residual, static_cast<const __half*>(delta), gain, bias, s, static_cast<__half*>(y), rows, columns, epsilon,
     stream);
}

}  // namespace jinaclip
