// MeanPool: x [R, D] float16 or float32, offsets [B+1] -> y [B, D] float32, the mean of rows offsets[b] to offsets[b+1]-1.
// A text without rows gives NaN. A block takes 32 * Width columns of one text; its warps share the rows.
#include "operators.h"
#include "rows.h"

namespace jinaclip {
namespace {

constexpr int kWarps = 8;

template <typename In, int Width>
__global__ void mean_pool_kernel(const In* x, const int32_t* offsets,
                                 float* __restrict__ y, int64_t rows, int columns) {
  begin_kernel();
  __shared__ float of_warps[kWarps][kWarp * Width];
  const int column = (blockIdx.y * kWarp + threadIdx.x) * Width;
  const int64_t text = blockIdx.x;
  int64_t begin = offsets[text], end = offsets[text + 1];
  begin = begin < 0 ? 0 : begin;
  end = end > rows ? rows : end;
  float sums[Width] = {};
  if (column < columns) {
#pragma unroll 4
    for (int64_t row = begin + threadIdx.y; row < end; row += kWarps) {
      float values[Width];
      load(x + row * columns + column, values);
#pragma unroll
      for (int i = 0; i < Width; ++i) {
        sums[i] += values[i];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < Width; ++i) {
    of_warps[threadIdx.y][threadIdx.x * Width + i] = sums[i];
  }
  __syncthreads();
  if (threadIdx.y == 0 && column < columns) {
    const float count = end > begin ? static_cast<float>(end - begin) : 0.0f;
#pragma unroll
    for (int i = 0; i < Width; ++i) {
      float sum = 0.0f;
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) {
        sum += of_warps[warp][threadIdx.x * Width + i];
      }
      sums[i] = sum / count;
    }
    store(y + text * columns + column, sums);
  }
}

template <typename In>
void mean_pool_of(const In* x, const int32_t* offsets, float* y, int64_t rows, int texts, int columns, Stream stream) {
  const int width = columns % 4 == 0 && aligned(x) && aligned(y) ? 4 : 1;
  const auto kernel = width == 4 ? mean_pool_kernel<In, 4> : mean_pool_kernel<In, 1>;
  const int in_block = kWarp * width;
  launch(kernel, dim3(static_cast<unsigned>(texts), static_cast<unsigned>((columns + in_block - 1) / in_block)),
         dim3(kWarp, kWarps), stream, x, offsets, y, rows, columns);
}

}  // namespace

void mean_pool(const void* x, bool x_is_float32, const int32_t* offsets, float* y, int64_t rows, int texts,
               int columns, Stream stream) {
  if (x_is_float32) {
    mean_pool_of(static_cast<const float*>(x), offsets, y, rows, texts, columns, stream);
  } else {
    mean_pool_of(static_cast<const __half*>(x), offsets, y, rows, texts, columns, stream);
  }
}

}  // namespace jinaclip
