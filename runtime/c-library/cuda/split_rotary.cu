// SplitRotary: qkv [rows, 3D] float16 -> q, k, v [rows, D] float16; pairs of q and k are rotated by the angle of the
// row's index in its text, v is copied. Heads have K = D / num_heads columns; pairs are (i, i + K/2), or (2i, 2i+1) if
// interleaved. One read of qkv, one write of each output.
#include "operators.h"
#include "rows.h"

namespace jinaclip {
namespace {

// A thread handles Pairs pairs: two vectors of Pairs columns, or one of 2 * Pairs if interleaved. A block is one row,
// or one of the row's three parts.
template <int Pairs, bool Interleaved>
__global__ void split_rotary_kernel(const __half* qkv, const float* __restrict__ cos, const float* __restrict__ sin,
                                    __half* __restrict__ q, __half* __restrict__ k, __half* __restrict__ v,
                                    unsigned length, int columns, int head_columns) {
  begin_kernel();
  const int64_t row = blockIdx.x;
  const int part = blockIdx.y + threadIdx.y;  // q, k, v
  const int half = head_columns / 2;
  qkv += row * 3 * columns + part * columns;                          // [D]
  __half* out = (part == 0 ? q : part == 1 ? k : v) + row * columns;  // [D]
  const int64_t angles = int64_t{1} * (blockIdx.x % length) * half;   // the row's, in cos and sin
  for (int unit = threadIdx.x; unit < columns / (2 * Pairs); unit += blockDim.x) {
    // `first` and `second` are where the two vectors of the unit begin, `pair` is the first of its pairs in the head.
    int first, second, pair;
    if (Interleaved) {
      first = unit * 2 * Pairs;
      second = first + Pairs;
      pair = first % head_columns / 2;
    } else if (part == 2) {
      first = unit * Pairs;
      second = columns / 2 + first;
      pair = 0;
    } else {
      const int units_of_head = half / Pairs;
      pair = unit % units_of_head * Pairs;
      first = unit / units_of_head * head_columns + pair;
      second = first + half;
    }
    if constexpr (Interleaved && Pairs > 1) {
      float values[2 * Pairs];
      load(qkv + first, values);
      if (part < 2) {
        float c[Pairs], s[Pairs];
        load(cos + angles + pair, c);
        load(sin + angles + pair, s);
#pragma unroll
        for (int i = 0; i < Pairs; ++i) {
          const float a = values[2 * i], b = values[2 * i + 1];
          values[2 * i] = a * c[i] - b * s[i];
          values[2 * i + 1] = a * s[i] + b * c[i];
        }
      }
      store(out + first, values);
    } else {
      float a[Pairs], b[Pairs];
      load(qkv + first, a);
      load(qkv + second, b);
      if (part < 2) {
        float c[Pairs], s[Pairs];
        load(cos + angles + pair, c);
        load(sin + angles + pair, s);
#pragma unroll
        for (int i = 0; i < Pairs; ++i) {
          const float x = a[i], y = b[i];
          a[i] = x * c[i] - y * s[i];
          b[i] = x * s[i] + y * c[i];
        }
      }
      store(out + first, a);
      store(out + second, b);
    }
  }
}

}  // namespace

void split_rotary(const Half* qkv, const float* cos, const float* sin, Half* q, Half* k, Half* v, int64_t rows,
                  int64_t length, int columns, int num_heads, bool interleaved, Stream stream) {
  const int head_columns = columns / num_heads;
  const bool vectors = head_columns % (interleaved ? 8 : 16) == 0 && aligned(qkv) && aligned(cos) && aligned(sin) &&
                       aligned(q) && aligned(k) && aligned(v);
  const int pairs = !vectors ? 1 : interleaved ? 4 : 8;
  const auto kernel = !vectors      ? (interleaved ? split_rotary_kernel<1, true> : split_rotary_kernel<1, false>)
                      : interleaved ? split_rotary_kernel<4, true>
                                    : split_rotary_kernel<8, false>;
  const int units = columns / (2 * pairs);
  const unsigned in_block = rows <= kFewRows ? 1 : 3;  // parts
  launch(kernel, dim3(static_cast<unsigned>(rows), 3 / in_block),
         dim3(static_cast<unsigned>(units < 256 ? units : 256), in_block), stream, static_cast<const __half*>(qkv), cos,
         sin, static_cast<__half*>(q), static_cast<__half*>(k), static_cast<__half*>(v), static_cast<unsigned>(length),
         columns, head_columns);
}

}  // namespace jinaclip
