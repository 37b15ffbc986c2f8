// SwigluNorm: gate_up [rows, 2W] float16 -> y [rows, W] float16, the LayerNorm over F columns of silu(gate) * up, then
// W - F zeros. The gate is columns 0 to F-1, up is columns W to W+F-1. The product, up to 65504^2, stays in float32.
#include "operators.h"
#include "rows.h"

namespace jinaclip {
namespace {

constexpr int kWidth = 8;

__device__ inline float gated(float gate, float up) {
  return gate * fast_reciprocal(1.0f + fast_exp2(-1.44269504f * gate)) * up;
}

template <int Threads, int Groups>
__global__ void swiglu_norm_kernel(const __half* gate_up, const float* __restrict__ gain,
                                   const float* __restrict__ bias, __half* __restrict__ y, int64_t rows, int columns,
                                   int padded, float epsilon) {
  begin_kernel();
  const int64_t row = row_index();
  if (row >= rows) {
    return;
  }
  const int lane = threadIdx.x;
  const __half* gate = gate_up + row * 2 * padded;  // [W]
  const __half* up = gate + padded;                 // [W]
  y += row * padded;                                // [W]
  float values[Groups][kWidth] = {};                // [Groups, Width] of this thread, like the next
  float ups[Groups][kWidth] = {};
#pragma unroll
  for (int g = 0; g < Groups; ++g) {
    const int column = (g * Threads + lane) * kWidth;
    if (column < columns) {
      load(gate + column, values[g]);
      load(up + column, ups[g]);
    }
  }
#pragma unroll
  for (int g = 0; g < Groups; ++g) {
    const int column = (g * Threads + lane) * kWidth;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float product = gated(values[g][i], ups[g][i]);
      values[g][i] = column + i < columns ? product : 0.0f;  // what the padding holds does not count
    }
  }
  normalise<Threads>(values, lane, columns, epsilon);
#pragma unroll
  for (int g = 0; g < Groups; ++g) {
    const int column = (g * Threads + lane) * kWidth;
    const int full = column + kWidth <= columns ? column : 0;
    float gains[kWidth], biases[kWidth];
    load(gain + full, gains);
    load(bias + full, biases);
    if (column < columns && column + kWidth > columns) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const int at = column + i < columns ? column + i : column;
        gains[i] = gain[at];
        biases[i] = bias[at];
      }
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      values[g][i] = column + i < columns ? fmaf(values[g][i], gains[i], biases[i]) : 0.0f;
    }
    if (column < padded) {
      store(y + column, values[g]);
    }
  }
}

__global__ void swiglu_norm_wide_kernel(const __half* gate_up, const float* __restrict__ gain,
                                        const float* __restrict__ bias, __half* __restrict__ y, int columns,
                                        int padded, float epsilon) {
  begin_kernel();
  const __half* gate = gate_up + static_cast<int64_t>(blockIdx.x) * 2 * padded;
  const __half* up = gate + padded;
  y += static_cast<int64_t>(blockIdx.x) * padded;
  normalise_wide<kWideThreads>(
      threadIdx.x, columns, epsilon, [=](int column) { return gated(to_float(gate[column]), to_float(up[column])); },
      [=](int column, float normed) { from_float(normed * gain[column] + bias[column], y[column]); });
  for (int column = columns + threadIdx.x; column < padded; column += kWideThreads) {
    from_float(0.0f, y[column]);
  }
}

}  // namespace

void swiglu_norm(const Half* gate_up, const float* gain, const float* bias, Half* y, int64_t rows, int columns,
                 int padded, float epsilon, Stream stream) {
  const __half* in = static_cast<const __half*>(gate_up);
  __half* out = static_cast<__half*>(y);
  const bool vectors = padded % kWidth == 0 && aligned(in) && aligned(gain) && aligned(bias) && aligned(out);
  choose_row_shape<kWidth>(
      rows, padded, vectors,
      [&](auto shape) {
        constexpr int threads = decltype(shape)::Threads;
        const RowGrid g = row_grid<threads>(rows);
        launch(swiglu_norm_kernel<threads, decltype(shape)::Groups>, g.grid, g.block, stream, in, gain, bias, out,
               rows, columns, padded, epsilon);
      },
      [&] {
        launch(swiglu_norm_wide_kernel, dim3(static_cast<unsigned>(rows)), dim3(kWideThreads), stream, in, gain, bias,
               out, columns, padded, epsilon);
      });
}

}  // namespace jinaclip
