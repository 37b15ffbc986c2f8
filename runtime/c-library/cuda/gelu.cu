// Gelu: x [count] float16 -> y [count] float16, x * Phi(x) with the exact error function.
#include "operators.h"
#include "rows.h"

namespace jinaclip {
namespace {

// Phi(-|x|) = t P(t) exp(-x^2 / 2) with t = 1 / (1 + 0.42 |x| / sqrt(2)). P is fitted to the relative error, which is
// at most 1.1e-6 for |x| < 6; below that the result is 0 in float16. erff takes twice the instructions, and 1 + erff
// loses digits where it nears 0.
__device__ inline float gelu_of(float x) {
  const float t = fast_reciprocal(1.0f + 0.296984848f * fabsf(x));
  float tail = -0.0856656644f;
  tail = tail * t + 0.25198666f;
  tail = tail * t - 0.0581204858f;
  tail = tail * t + 0.165651215f;
  tail = tail * t + 0.106685899f;
  tail = tail * t + 0.11946185f;
  tail *= t * fast_exp2(-0.72134752f * x * x);
  return x * (x < 0.0f ? tail : 1.0f - tail);
}

template <int Width>
__global__ void gelu_kernel(const __half* x, __half* __restrict__ y, int64_t count) {
  begin_kernel();
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
  const int threads = count < (int64_t{1} << 20) ? 64 : 256;  // a block for each multiprocessor, where there are few
  const int width = aligned(x) && aligned(y) ? 8 : 1;
  const auto kernel = width == 8 ? gelu_kernel<8> : gelu_kernel<1>;
  const int64_t in_block = int64_t{1} * threads * width;
  launch(kernel, dim3(static_cast<unsigned>((count + in_block - 1) / in_block)), dim3(threads), stream,
         static_cast<const __half*>(x), static_cast<__half*>(y), count);
}

}  // namespace jinaclip
