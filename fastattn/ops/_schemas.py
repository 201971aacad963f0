"""The schemas of the raw ops, as data. They are defined nowhere else.

setup.py builds a library from them that the compiled kernels load themselves, so a program that loads only _cpu.so,
without this package and without Python, finds the ops. If that library was not built, fastattn.ops defines the ops.

An op has one overload per backend; the device is the dispatch key. Ops that compute outputs of a model also exist as
<name>_<backend>: the same kernel, with an autograd formula, for tracers to record (`_register.traced_backend`). They
are separate names because TorchScript drops overload names.
"""

_BOTH = (".native", ".triton")
_TRACED = (*_BOTH, "_native", "_triton")

_ATTENTION_INPUTS = (
    "Tensor? bias, Tensor? sink, Tensor? mask, Tensor? seqlens_k, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k,"
    " Tensor? alibi_slopes, Tensor? rng, SymInt max_seqlen_q, SymInt max_seqlen_k, SymInt window_left,"
    " SymInt window_right, bool top_left, float softcap, float dropout_p, float scale"
)
# q, k: (batch, heads, seqlen, head_dim) or, for a batch of one, (total, heads, head_dim), any strides. cos, sin: (rows,
# columns), or (batch or 1, seqlen, columns) without positions and offset; the first rotary_dim / 2 columns are read.
# positions: integers (seqlen,) or (batch or 1, seqlen); without them the position of a token is its index plus offset.
_ROTARY_INPUTS = (
    "Tensor cos, Tensor sin, Tensor? positions, SymInt offset, SymInt rotary_dim, bool interleaved, bool conjugate"
)

_STEP_INPUTS = (
    "Tensor x, Tensor[] norms, Tensor[] linears, Tensor? mask, Tensor? bias, Tensor[] memory, Tensor? rng,"
    " float[] options"
)

_SCHEMAS = (
    # (batch, heads, seqlen, head_dim) views of any strides; packed sequences are a batch of 1 with cu_seqlens. lse_low:
    # the rounding error of lse, (0,) unless need_low; in the backward (0,) if unknown
    (
        _TRACED,
        f"attention_fwd(Tensor q, Tensor k, Tensor v, {_ATTENTION_INPUTS}, bool need_low)"
        " -> (Tensor out, Tensor lse, Tensor lse_low)",
    ),
    (
        _BOTH,
        f"attention_bwd(Tensor? do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor lse_low,"
        f" {_ATTENTION_INPUTS}, bool need_dbias, bool deterministic)"
        " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsink)",
    ),
    # only out, for a call without features: the other arguments and lse take 3 of the 7 us of a small call
    (
        (".native",),
        "attention_infer(Tensor q, Tensor k, Tensor v, SymInt window_right, bool top_left, float scale) -> Tensor",
    ),
    (
        _TRACED,
        "attention_decode_fwd(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, Tensor? block_table,"
        " Tensor? cache_batch_idx, Tensor? cache_leftpad, Tensor? alibi_slopes, Tensor? sink, SymInt seqlen_new,"
        " SymInt window_left, SymInt window_right, float softcap, float scale, SymInt num_splits)"
        " -> (Tensor out, Tensor lse)",
    ),
    (
        _TRACED,
        "attention_decode_append(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor cache_seqlens,"
        " Tensor? block_table, Tensor? cache_batch_idx) -> ()",
    ),
    # only y, contiguous in the dtype of x, for calls without gradients
    (
        _BOTH,
        "norm_infer(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? rng, float dropout_p, float eps,"
        " bool rms, Tensor? x_bias=None) -> Tensor",
    ),
    # r is (0,) if it equals x: without residual, rng and x_bias. stats: fp32 (2, rows), mean and rstd; for rms only
    # rstd, (1, rows)
    (
        _TRACED,
        "norm_fwd(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? rng, float dropout_p, float eps,"
        " bool rms, Tensor? x_bias=None) -> (Tensor y, Tensor r, Tensor stats)",
    ),
    # dx: the dropout backward of dr, in the dtype of dy. dresidual: dr in the dtype of r, (0,) unless
    # separate_dresidual. dweight, dbias and dx_bias: in the dtype of the weight, fp32 without one, (0,) if not needed
    (
        _BOTH,
        "norm_bwd(Tensor dy, Tensor? dr_out, Tensor r, Tensor? weight, Tensor stats, Tensor? rng, float dropout_p,"
        " bool rms, bool separate_dresidual, bool need_dweight, bool need_dbias, bool need_dx_bias=False)"
        " -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias, Tensor dx_bias)",
    ),
    (_TRACED, "dropout_fwd(Tensor x, Tensor? residual, Tensor rng, float dropout_p) -> Tensor"),
    # results have the layout of q and k; the second is (0,) without k
    (_TRACED, f"rotary_fwd(Tensor q, Tensor? k, {_ROTARY_INPUTS}) -> (Tensor, Tensor)"),
    (_BOTH, f"rotary_fwd_(Tensor(a!) q, Tensor(b!)? k, {_ROTARY_INPUTS}) -> ()"),
    (
        _TRACED,
        "activation_fwd(Tensor preact, Tensor? gate, Tensor? rng, float dropout_p, int activation) -> Tensor",
    ),
    (
        _BOTH,
        "activation_bwd(Tensor dhidden, Tensor preact, Tensor? gate, Tensor? rng, float dropout_p, int activation,"
        " bool need_hidden, bool need_dbias, bool need_dbias_gate)"
        " -> (Tensor dpreact, Tensor dgate, Tensor hidden, Tensor dbias, Tensor dbias_gate)",
    ),
    # loss: fp32 (rows). If need_grad, logits (rows, vocab) are overwritten by their gradient for dloss, fp32 (rows) or
    # None for ones. A target that is neither a column nor ignore_index makes the loss and gradient of its row NaN.
    (
        _BOTH,
        "cross_entropy_fwd(Tensor(a!) logits, Tensor target, Tensor? dloss, int ignore_index, float label_smoothing,"
        " float z_loss, float softcap, bool need_grad) -> Tensor",
    ),
    # x (tokens, d_model), target int64 (tokens); dx in the dtype of x, dweight and dbias in fp32; (0,) if not needed.
    # chunk_size 0: chosen from the sizes
    (
        _TRACED,
        "linear_cross_entropy_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor? dloss,"
        " int ignore_index, float label_smoothing, float z_loss, float softcap, int chunk_size, bool need_dx,"
        " bool need_dweight, bool need_dbias) -> (Tensor loss, Tensor dx, Tensor dweight, Tensor dbias)",
    ),
    # a (m, k) · b (k, n) + bias (n), float32 of any strides; an operand may be given transposed
    (
        (".native",),
        "gemm(Tensor a, Tensor b, Tensor? bias, bool transpose_a, bool transpose_b) -> Tensor",
    ),
    # out (m, n), last stride 1, += a (m, k) · b (k, n)
    ((".native",), "gemm_add_(Tensor(a!) out, Tensor a, Tensor b, bool transpose_a, bool transpose_b) -> ()"),
    # x (m, k) float32 · weightᵀ + bias, for few rows: weight (n, k) float32, bfloat16, or int8 with a scale (n)
    ((".native",), "gemv(Tensor x, Tensor weight, Tensor? scale, Tensor? bias) -> Tensor"),
    # A layer of new tokens x (batch, seqlen, d_model), float32, whose keys and values are added to the caches.
    # norms: weight and bias of norm1 and norm2. linears: weight, scale and bias of in_proj, out_proj, linear1, linear2
    # and, if gated, gate. A tensor without elements is absent. cos, sin: (rows, rotary_dim / 2). The products with fp32
    # weights are those of gemv up to most_few_rows tokens, those of gemm up to most_own_rows, and then torch's.
    (
        (".native",),
        "layer_decode(Tensor x, Tensor[] norms, Tensor[] linears, Tensor(a!) k_cache, Tensor(b!) v_cache,"
        " Tensor cache_seqlens, Tensor? cos, Tensor? sin, bool interleaved, Tensor? alibi_slopes,"
        " int most_few_rows, int most_own_rows, int n_heads, bool norm_first, int activation, float eps1, float eps2)"
        " -> Tensor",
    ),
    # An encoder layer of x (batch, seqlen, d_model), or (seqlen, batch, d_model) without batch_first, float32. norms,
    # linears (with float32 weights), most_few_rows and most_own_rows are as above; mask and bias are as in
    # attention_fwd. In a decoder layer, linears also has in_proj and out_proj of the attention to the memory, and norms
    # also has norm3. memory: its tokens, laid out like x, a mask and a bias.
    (
        (".native",),
        "layer_encode(Tensor x, Tensor[] norms, Tensor[] linears, Tensor? mask, Tensor? bias, bool causal,"
        " Tensor[] memory, bool memory_causal, bool batch_first, int most_few_rows, int most_own_rows, int n_heads,"
        " bool norm_first, int activation, float eps1, float eps2, float eps3)"
        " -> Tensor",
    ),
    # The same in a training step. rng: int64 (n, 2), a state for each dropout with a p other than 0. The dropouts are
    # those of attention, its result, attention to the memory, its result, the hidden layer and its result. options:
    # those of layer_step.py. Returns the result and what the backward reads. grads: of x, (0,) if not needed; of weight
    # and bias of each of linears and norms, (0,) if absent; and, if there is a memory, of its tokens, (0,) if not
    # needed.
    ((".native",), f"layer_encode_fwd({_STEP_INPUTS}) -> Tensor[]"),
    (
        (".native",),
        f"layer_encode_bwd(Tensor dy, Tensor[] kept, bool need_dx, bool need_dmemory, {_STEP_INPUTS})"
        " -> Tensor[] grads",
    ),
    # mask (size, size), bool (True = ignore) or float. Returns whether row i sees exactly columns 0 to i
    (("",), "is_causal_mask(Tensor mask) -> bool"),
    # properties of the CPU library, for tests and `fastattn info`
    (("",), "parallel_chunks() -> int"),
    (("",), "cpu_capability() -> int"),
)


NAMES = {}
"""Per op ("norm_fwd"), its full names ("norm_fwd.native", ...)."""
DEFINITIONS = {}
"""Per full name, the schema that torch.library takes, without the namespace."""

for _suffixes, _schema in _SCHEMAS:
    _name, _, _signature = _schema.partition("(")
    NAMES[_name] = tuple(_name + _suffix for _suffix in _suffixes)
    DEFINITIONS.update({_full: f"{_full}({_signature}" for _full in NAMES[_name]})
