#pragma once
// The interface between the op wrappers (LibTorch stable ABI) and the kernels, which include no torch header. The
// kernels take plain structs and raw pointers and return an error code.
#include <atomic>
#include <cstdint>

namespace fastattn {

enum class DType : int { kFloat32, kBFloat16, kFloat16 };

// Declares one CPU kernel for every instruction set. It processes rows, tiles or chunks [begin, end) on the calling
// thread.
#define FASTATTN_DECLARE_CPU(name, Args)                             \
  void name##_default(const Args& args, int64_t begin, int64_t end); \
  void name##_avx2(const Args& args, int64_t begin, int64_t end);    \
  void name##_avx512(const Args& args, int64_t begin, int64_t end)

// Dropout. A kept element is multiplied by scale. An element is kept if its 16-bit random word is at least threshold.
// rng points to (seed, offset) on the device of the op. Without dropout it is null; otherwise threshold > 0.
struct Dropout {
  const int64_t* rng;
  uint32_t threshold;
  float scale;
};

struct DropoutArgs {
  const void* x;         // (rows, cols), rows x_stride apart
  const void* residual;  // has out_dtype, or null
  void* out;             // contiguous
  int64_t rows, cols, x_stride, residual_stride;
  DType x_dtype, out_dtype;
  Dropout dropout;
};
FASTATTN_DECLARE_CPU(dropout_fwd, DropoutArgs);  // processes rows

struct NormFwdArgs {
  // (rows, cols), rows x_stride apart. Without x_bias, residual, dropout and r the CPU kernels read it as r_dtype.
  const void* x;
  const void* residual;  // has r_dtype, or null
  const void* weight;    // (cols) of weight_dtype, or null; the CPU kernels read fp32
  const void* bias;      // (cols) of bias_dtype, or null; the CPU kernels read fp32
  const void* x_bias;    // (cols) of x_bias_dtype, or null; the CPU kernels read fp32
  void* y;               // has x_dtype, contiguous
  void* r;               // contiguous, or null if not wanted
  float* mean;           // (rows), or null for RMSNorm or if not wanted
  float* rstd;           // (rows), or null if not wanted
  int64_t rows, cols, x_stride, residual_stride;
  float eps;
  bool rms;
  DType x_dtype, r_dtype, weight_dtype, bias_dtype, x_bias_dtype;
  Dropout dropout;
};
FASTATTN_DECLARE_CPU(norm_fwd, NormFwdArgs);  // processes rows

constexpr int kNormSums = 3;

struct NormBwdArgs {
  const void* dy;      // has x_dtype, rows dy_stride apart
  const void* dr_out;  // has r_dtype, or null
  const void* r;       // rows r_stride apart
  const void* weight;  // has weight_dtype, or null; the CPU kernels read fp32
  const float* mean;   // null for RMSNorm
  const float* rstd;
  void* dx;         // has x_dtype, contiguous
  void* dresidual;  // has r_dtype, contiguous, or null if it is equal to dx
  void* dweight;    // has weight_dtype, or null
  void* dbias;      // has weight_dtype, or null
  void* dx_bias;    // has weight_dtype, or null
  float* sums;      // (chunks, kNormSums, cols): the sums of dweight, dbias and dx_bias over the rows of a chunk
  int64_t rows, cols, dy_stride, dr_out_stride, r_stride, rows_per_chunk, chunks;
  DType x_dtype, r_dtype, weight_dtype;
  Dropout dropout;
};
FASTATTN_DECLARE_CPU(norm_bwd, NormBwdArgs);          // processes chunks
FASTATTN_DECLARE_CPU(norm_bwd_columns, NormBwdArgs);  // processes columns, after all chunks

// The CUDA launchers. `stream` is a cudaStream_t of the current device; the result is a cudaError_t.
int dropout_fwd_cuda(const DropoutArgs& args, void* stream);
int norm_fwd_cuda(const NormFwdArgs& args, void* stream);
int norm_bwd_cuda(const NormBwdArgs& args, void* stream);
int64_t norm_bwd_chunks_cuda(const NormBwdArgs& args);  // the required args.chunks; 0 if no sums are wanted
const char* cuda_error_string(int error);

// Feed-forward: the passes between the matrix products. The rows of inputs are a stride apart; outputs are contiguous.
// A null pointer means an absent input or an output that is not wanted. The activations have the order of
// reference.ACTIVATIONS.
enum class Activation : int { kGelu, kGeluTanh, kRelu, kRelu2, kSilu };

struct ActivationArgs {
  const void* preact;
  const void* gate;
  const void* dhidden;
  int64_t preact_stride, gate_stride, dhidden_stride;
  void* hidden;
  void* dpreact;
  void* dgate;
  float* dbias_partial;  // one row of sums per block of rows (CUDA: per chunk); a later pass adds the rows in order
  float* dbias_gate_partial;
  void* dbias;
  void* dbias_gate;
  int64_t rows, cols, chunks;
  Dropout dropout;
  Activation activation;
  DType dtype;
};

constexpr int64_t kActivationBlockRows = 32;

FASTATTN_DECLARE_CPU(activation_fwd, ActivationArgs);  // processes rows
FASTATTN_DECLARE_CPU(activation_bwd, ActivationArgs);  // processes blocks of kActivationBlockRows rows

int activation_fwd_cuda(const ActivationArgs& args, void* stream);
int activation_bwd_cuda(const ActivationArgs& args, void* stream);
int64_t activation_bwd_chunks_cuda(const ActivationArgs& args);  // the required args.chunks; reads the sizes only

struct ColumnSumsArgs {
  const void* x;  // (rows, cols), contiguous
  void* out;      // (cols)
  int64_t rows, cols;
  DType x_dtype, out_dtype;
};
FASTATTN_DECLARE_CPU(column_sums, ColumnSumsArgs);  // processes columns

// Softmax cross-entropy of rows of logits. If the gradient is wanted, it replaces the logits.
struct CrossEntropyArgs {
  void* logits;           // (rows, cols), rows logits_stride apart
  const int64_t* target;  // (rows): a column or ignore_index; any other value makes the row NaN
  const float* dloss;     // (rows), or null, which means ones
  float* loss;            // (rows)
  int64_t rows, cols, logits_stride, ignore_index;
  float label_smoothing, z_loss, softcap;  // softcap 0 means no cap
  bool need_grad;
  DType dtype;
};
FASTATTN_DECLARE_CPU(cross_entropy_fwd, CrossEntropyArgs);  // processes rows

// c (m, n) = a (m, k) · b (k, n) in fp32, plus bias or plus c. Strides count elements. One of the two strides of a must
// be 1, and so must one of the two strides of b.
struct GemmArgs {
  const float *a, *b;
  const float* bias;  // (n), or null
  float* c;           // rows c_row apart
  int64_t m, n, k;
  int64_t a_row, a_col, b_row, b_col, c_row;
  bool add;  // adds the product to c
  // kFewRows reads b in place. It requires b_row == 1 and !add.
  enum class Way { kBlocked, kFewRows } way;
  int64_t rows;               // kBlocked: the rows of a task
  std::atomic<bool>* failed;  // set if a thread runs out of memory
};
constexpr int64_t kGemmPanel = 64;     // kBlocked: the columns of a task
constexpr int64_t kGemmGroup = 16;     // kFewRows: the columns of a task
FASTATTN_DECLARE_CPU(gemm, GemmArgs);  // processes tasks

// y (m, n) = x (m, k) · weightᵀ, times scale, plus bias, plus residual. x has few rows, and the weight is read in
// place. The strides between rows count elements; the last stride is 1.
enum class WeightType : int { kFloat32, kBFloat16, kInt8 };

struct GemvArgs {
  const float* x;
  const void* weight;     // (n, k)
  const float* scale;     // (n), or null
  const float* bias;      // (n), or null
  const float* residual;  // (m, n), or null; may be equal to y
  float* y;
  int64_t m, n, k;
  int64_t x_row, weight_row, residual_row, y_row;
  WeightType type;
};
constexpr int64_t kGemvGroup = 16;     // the columns of a task
FASTATTN_DECLARE_CPU(gemv, GemvArgs);  // processes tasks

// The same in bfloat16, without scale and residual. The numbers are passed as their bits.
struct FewRowsArgs {
  const uint16_t *x, *weight;  // (m, k), (n, k)
  const uint16_t* bias;        // (n), or null
  uint16_t* y;
  int64_t m, n, k;
  int64_t x_row, weight_row, y_row;
  std::atomic<bool>* failed;  // set if a thread runs out of memory
};
void few_rows_avx512bf16(const FewRowsArgs& args, int64_t begin, int64_t end);  // processes tasks of kGemvGroup columns

// Attention. Sizes and strides count elements; the last stride is 1. Packed sequences have batch stride 0; sequence b
// begins at row cu_seqlens[b].
struct HeadTensor {
  void* data;
  int64_t batch, head, row;
};

// A dimension that is broadcast has stride 0. If the tensor is absent, data is null.
struct ScoreTensor {
  const void* data;
  int64_t batch, head, row, key;
};

constexpr int64_t kAttentionPieceKeys = 256;  // the CPU backward sums dk and dv over this many keys at a time

struct AttentionArgs {
  HeadTensor q, k, v, out, dout, dq, dk, dv;
  float* lse;         // (batch, head, row): strides lse_batch, lse_head, 1; null if the forward need not save it
  float* lse_low;     // like lse: its rounding error; null if it is not wanted (forward) or was not saved (backward)
  const float* dlse;  // like lse, or null
  int64_t lse_batch, lse_head;
  ScoreTensor mask, bias;
  DType bias_dtype;
  const int32_t *seqlens_k, *cu_seqlens_q, *cu_seqlens_k;
  const float* alibi_slopes;
  int64_t alibi_batch;
  const float* sink;
  // If the sequences are packed, seqlen_q and seqlen_k are the largest lengths.
  int64_t batch, n_heads, n_kv_heads, seqlen_q, seqlen_k, head_dim, head_dim_v;
  int64_t window_left, window_right;  // -1 means unlimited
  bool top_left;
  float softcap, scale;
  Dropout dropout;
  DType dtype;
};

// The additional arguments of the CPU kernels.
struct AttentionCpuArgs : AttentionArgs {
  // The next task. Threads claim tasks dynamically; results do not depend on which thread takes which.
  std::atomic<int64_t>* next;
  std::atomic<bool>* failed;  // set if a thread runs out of memory
  // The following fields are for the backward.
  float* dsink_partial;  // (batch, head), or null
  ScoreTensor dbias;     // strides as if broadcast dimensions had size 1; null if not wanted
  // Which tasks compute dbias: the tasks of the backward, for one sequence or summed over a whole batch, or the tasks
  // of attention_dbias.
  enum class DbiasFrom { kSequence, kWholeBatch, kOwnPass } dbias_from;
  bool piece_per_task;  // each piece of a head's keys is a task; for 16-bit dtypes attention_dq then computes dq
  // (batch, head, block of queries): the number of pieces that were added to dq; for fp32 with piece_per_task
  std::atomic<int32_t>* dq_turns;
};

// Rotary embedding of one tensor, or of two that share head_dim and the position of each token. Packed sequences are
// treated as a batch of one.
struct RotaryArgs {
  HeadTensor x[2], out[2];  // out may alias x
  int64_t n_heads[2];       // 0 if there is no second tensor
  // The tables have table_dtype. Row p is position p; the tables of two batch entries are table_batch apart.
  const void *cos, *sin;
  int64_t table_rows, table_row, table_batch;
  int64_t table_step;    // between the columns of neighbouring pairs
  int64_t table_second;  // from the column of a pair's first channel to that of its second; 0: they share one
  const void*
      positions;  // int64 if wide_positions, else int32, positions_batch apart; null: offset + index of the token
  int64_t positions_batch, offset;
  int64_t batch, seqlen, head_dim, rotary_dim;
  bool wide_positions, interleaved, conjugate;  // conjugate: the gradient
  DType dtype, table_dtype;
};

constexpr int64_t kRotaryTokens = 16;  // the tokens of a piece of the CPU kernel

FASTATTN_DECLARE_CPU(rotary_fwd, RotaryArgs);  // processes pieces; a batch entry has ceil(seqlen / kRotaryTokens)

int rotary_fwd_cuda(const RotaryArgs& args, void* stream);

#define FASTATTN_DECLARE_ATTENTION(variant)                   \
  void attention_fwd_##variant(const AttentionCpuArgs& args); \
  void attention_bwd_##variant(const AttentionCpuArgs& args); \
  void attention_dq_##variant(const AttentionCpuArgs& args);  \
  void attention_dbias_##variant(const AttentionCpuArgs& args)

FASTATTN_DECLARE_ATTENTION(default);
FASTATTN_DECLARE_ATTENTION(avx2);
FASTATTN_DECLARE_ATTENTION(avx512);
FASTATTN_DECLARE_ATTENTION(avx512bf16);  // bf16 only
FASTATTN_DECLARE_ATTENTION(amx);         // bf16 only

// Attention on a cache of keys and values. A row of the cache is a page of page_size keys. Without block_table, each
// sequence has one page.
struct DecodeArgs {
  HeadTensor q, k, v, out;         // the batch stride of k and v is the stride between pages
  float* lse;                      // (batch, head, row), contiguous
  const int32_t* cache_seqlens;    // the number of valid keys, without the seqlen_new appended ones
  const int32_t* block_table;      // (batch, pages), or null
  const int32_t* cache_batch_idx;  // the page of each sequence; null: its own index
  const int32_t* cache_leftpad;    // the first visible key; null: 0
  const float* alibi_slopes;       // like in AttentionArgs
  const float* sink;               // (n_heads), or null
  int64_t alibi_batch, seqlen_new, page_size, pages;
  int64_t batch, n_heads, n_kv_heads, seqlen_q, head_dim, head_dim_v;
  int64_t window_left, window_right;  // -1 means unlimited
  float softcap, scale;
  DType dtype;
  int64_t splits;              // the number of parts into which the keys of a sequence are divided
  float* partial;              // if splits > 1: decode_partial() floats per task
  std::atomic<int64_t>* next;  // the next task
  std::atomic<int32_t>*
      remaining;              // if splits > 1: splits that are still at work, per group of tasks; the last combines
  std::atomic<bool>* failed;  // set if a thread runs out of memory
};

constexpr int64_t kDecodeRows = 64;  // the rows of a task: the queries of all heads that share a key head
constexpr int kDecodeKeys = 128;     // the keys of a tile

// The number of floats for the partial result of a task: the weighted sums, padded for the widest vectors, and the
// maximum and total of each row.
constexpr int64_t decode_partial(int64_t rows, int64_t head_dim_v) {
  return rows * ((head_dim_v + 31) / 32 * 32 + 2);
}

void attention_decode_default(const DecodeArgs& args);
void attention_decode_avx2(const DecodeArgs& args);
void attention_decode_avx512(const DecodeArgs& args);
void attention_decode_avx512bf16(const DecodeArgs& args);  // bf16 only

// CUDA on Hopper (csrc/cuda/attention_*_sm90.cu). Packed tensors have batch 1.
struct AttentionCudaArgs : AttentionArgs {
  int64_t rows_q, rows_k;  // the number of rows of the tensors; packed: the sum of all lengths
  float *lse2, *delta;     // workspace of the backward: (batch, head, row), strides stats_batch, stats_head, 1
  int64_t stats_batch, stats_head;
  float* dq_sums;           // workspace: (batch, head, row, head_dim); null if a separate kernel computes dq
  uint32_t* tile_counters;  // workspace: 1 word for the forward, 2 for the backward
};
int64_t attention_stats_rows_sm90(const AttentionCudaArgs& args);  // the required stats_head
int attention_fwd_sm90(const AttentionCudaArgs& args, void* stream);
// fills the workspace; must run before the next kernels
int attention_stats_sm90(const AttentionCudaArgs& args, void* stream);
int attention_dkdv_sm90(const AttentionCudaArgs& args, void* stream);  // also adds to dq_sums, unless it is null
int attention_dq_sm90(const AttentionCudaArgs& args, void* stream);
int attention_round_sm90(const AttentionCudaArgs& args, void* stream);  // computes dq from dq_sums

// leftpad, ALiBi, softcap and sink are not supported. A page holds whole blocks of kDecodeKeysSm90 keys. If there are
// several splits, partial has the shape (split, batch, head, row, head_dim). partial_max and partial_sum lack its last
// dimension. They hold the maxima times log2(e) and the sums of the weights.
struct DecodeCudaArgs : DecodeArgs {
  int64_t cache_rows;
  HeadTensor k_new, v_new;  // seqlen_new keys to append
  float *partial_max, *partial_sum;
};
constexpr int kDecodeKeysSm90 = 64;
int64_t attention_decode_splits_sm90(const DecodeCudaArgs& args, int64_t wanted);  // the required args.splits
int attention_decode_fwd_sm90(const DecodeCudaArgs& args, void* stream);           // combines the splits too
int attention_decode_combine_sm90(const DecodeCudaArgs& args, void* stream);
int attention_decode_append_sm90(const DecodeCudaArgs& args, void* stream);

}  // namespace fastattn
