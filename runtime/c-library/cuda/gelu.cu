// Gelu: x [count] float16 -> y [count] float16, x * Phi(x) with the exact error function.
#include "operators.h"
#include "rows.h"

namespace jinaclip {
namespace {

__device__ inline float gelu_of(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f)); }

template <int Width>
__global__ void gelu_kernel(const __half* __restrict__ x, __half* __restrict__ y, int64_t count) {
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * Width;
  if (begin + Width <= count) {
    float values[Width];
    load(x + begin, values);
#pragma unroll
    for (int i = 0; i < Width; ++i) {
      values[i] = gelu_of(values[i]);
    }
    store(y + begin, values);
  } else {
    for (int64_t at = begin; at < count; ++at) {
      from_float(gelu_of(to_float(x[at])), y[at]);
    }
  }
}

}  // namespace

void gelu(const Half* x, Half* y, int64_t count, Stream stream) {
  constexpr int threads = 256;
  const int width = aligned(x) && aligned(y) ? 8 : 1;
  const auto kernel = width == 8 ? gelu_kernel<8> : gelu_kernel<1>;
  const int64_t in_block = static_cast<int64_t>(threads) * width;
  launch(kernel, dim3(static_cast<unsigned>((count + in_block - 1) / in_block)), dim3(threads), stream,
         static_cast<const __half*>(x), static_cast<__half*>(y), count);
}

}  // namespace jinaclip
