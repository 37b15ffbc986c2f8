// The operators as functions over raw tensors. Pointers are to device memory (host memory in the host build); `rows`
// is the product of all leading dimensions and at least 1. Work is queued on `stream`. Errors of CUDA and cublasLt are
// thrown as std::runtime_error.
#pragma once

#include <cstdint>
#include <memory>

namespace jinaclip {

using Stream = void*;
using Half = void;  // float16 elements

// x float16 or float32 [rows, columns]; gain, bias [columns]; y float16 [rows, columns].
void layer_norm(const void* x, bool x_is_float32, const float* gain, const float* bias, Half* y, int64_t rows,
                int columns, float epsilon, Stream stream);

// residual [rows, columns], delta float16 [rows, columns]; s [rows, columns]: the sum, or its norm if keep_norm;
// y float16 [rows, columns]: the norm.
void add_layer_norm(const float* residual, const Half* delta, const float* gain, const float* bias, float* s, Half* y,
                    int64_t rows, int columns, float epsilon, bool keep_norm, Stream stream);

// residual float16 or float32 [rows, columns], or [columns] if one_residual; delta, y float16 [rows, columns]: y is the
// norm of the sum.
void add_post_norm(const void* residual, bool residual_is_float32, bool one_residual, const Half* delta,
                   const float* gain, const float* bias, Half* y, int64_t rows, int columns, float epsilon,
                   Stream stream);

// qkv float16 [rows, 3 * columns]; cos, sin [length or more, columns / num_heads / 2]; a row's position is its index
// modulo `length`; q, k, v float16 [rows, columns].
void split_rotary(const Half* qkv, const float* cos, const float* sin, Half* q, Half* k, Half* v, int64_t rows,
                  int64_t length, int columns, int num_heads, bool interleaved, Stream stream);

// Columns of a head in rotary_attention.
constexpr int kHeadColumns = 64;

// Rows of `keys` that rotary_attention needs: `rows`, or 0 where it turns keys as it loads them.
int64_t rotated_key_rows(int64_t rows, int64_t longest);

// qkv float16 [rows, 3 * num_heads * 64]; text b is rows offsets[b] to offsets[b + 1] - 1 (offsets int32 [texts + 1],
// rows of a text beyond `longest` are not written), or without offsets b * longest to (b + 1) * longest - 1; positions
// [rows], or null: a row's index in its text; cos, sin [table_rows, 32]; y float16 [rows, num_heads * 64], of which
// rows of no text are not written; keys: memory of float16 [rotated_key_rows, num_heads * 64].
void rotary_attention(const Half* qkv, const float* cos, const float* sin, const int32_t* positions,
                      const int32_t* offsets, Half* y, Half* keys, int64_t rows, int64_t longest, int texts,
                      int table_rows, int num_heads, bool interleaved, Stream stream);

// gate_up float16 [rows, 2 * padded]; gain, bias [columns], columns <= padded; y float16 [rows, padded].
void swiglu_norm(const Half* gate_up, const float* gain, const float* bias, Half* y, int64_t rows, int columns,
                 int padded, float epsilon, Stream stream);

// x, y float16 [count].
void gelu(const Half* x, Half* y, int64_t count, Stream stream);

// x float16 or float32 [rows, columns]; offsets [texts + 1]; y [texts, columns].
void mean_pool(const void* x, bool x_is_float32, const int32_t* offsets, float* y, int64_t rows, int texts, int columns,
               Stream stream);

// x, y [rows, columns].
void l2_normalize(const float* x, float* y, int64_t rows, int columns, Stream stream);

// One product of a graph. `run` may be called from several threads at once.
class Linear {
 public:
  Linear();
  ~Linear();

  // x float16 [m, k]; weight float16 [k, n]; bias float16 [n] or null; y float16 [m, n].
  void run(const Half* x, const Half* weight, const Half* bias, Half* y, int64_t m, int n, int k, Stream stream);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace jinaclip
