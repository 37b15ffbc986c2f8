// LayerNorm: x [rows, D] float16 or float32 -> y [rows, D] float16. One read of x, one write of y.
#include "operators.h"
#include "rows.h"

namespace jinaclip {
namespace {

template <typename In, int Threads, int Groups, int Width>
__global__ void layer_norm_kernel(const In* x, const float* __restrict__ gain,
                                  const float* __restrict__ bias, __half* __restrict__ y, int64_t rows, int columns,
                                  float epsilon) {
  begin_kernel();
  const int64_t row = row_index();
  if (row >= rows) {
    return;
  }
  const int lane = threadIdx.x;
  x += row * columns;                // [D]
  y += row * columns;                // [D]
  float values[Groups][Width] = {};  // [Groups, Width] of this thread
#pragma unroll
  for (int g = 0; g < Groups; ++g) {
    const int column = (g * Threads + lane) * Width;
    if (column < columns) {
      load(x + column, values[g]);
    }
  }
  GainAndBias<Threads, Groups, Width> gain_and_bias(gain, bias, lane, columns);
  normalise<Threads>(values, lane, columns, epsilon);
#pragma unroll
  for (int g = 0; g < Groups; ++g) {
    const int column = (g * Threads + lane) * Width;
    gain_and_bias.apply(g, values[g]);
    if (column < columns) {
      store(y + column, values[g]);
    }
  }
}

template <typename In>
__global__ void layer_norm_wide_kernel(const In* x, const float* __restrict__ gain,
                                       const float* __restrict__ bias, __half* __restrict__ y, int columns,
                                       float epsilon) {
  begin_kernel();
  x += static_cast<int64_t>(blockIdx.x) * columns;
  y += static_cast<int64_t>(blockIdx.x) * columns;
  normalise_wide<kWideThreads>(
      threadIdx.x, columns, epsilon, [=](int column) { return to_float(x[column]); },
      [=](int column, float normed) { from_float(normed * gain[column] + bias[column], y[column]); });
}

template <typename In, int Width>
void layer_norm_of(const In* x, const float* gain, const float* bias, __half* y, int64_t rows, int columns,
                   float epsilon, Stream stream) {
  const bool vectors = columns % Width == 0 && aligned(x) && aligned(gain) && aligned(bias) && aligned(y);
  choose_row_shape<Width>(
      rows, columns, vectors,
      [&](auto shape) {
        constexpr int threads = decltype(shape)::Threads;
        const RowGrid g = row_grid<threads>(rows);
        launch(layer_norm_kernel<In, threads, decltype(shape)::Groups, Width>, g.grid, g.block, stream, x, gain, bias,
               y, rows, columns, epsilon);
      },
      [&] {
        launch(layer_norm_wide_kernel<In>, dim3(static_cast<unsigned>(rows)), dim3(kWideThreads), stream, x, gain,
               bias, y, columns, epsilon);
      });
}

}  // namespace

void layer_norm(const void* x, bool x_is_float32, const float* gain, const float* bias, Half* y, int64_t rows,
                int columns, float epsilon, Stream stream) {
  __half* out = static_cast<__half*>(y);
  if (x_is_float32) {
    layer_norm_of<float, 4>(static_cast<const float*>(x), gain, bias, out, rows, columns, epsilon, stream);
  } else {
    layer_norm_of<__half, 8>(static_cast<const __half*>(x), gain, bias, out, rows, columns, epsilon, stream);
  }
}

}  // namespace jinaclip
