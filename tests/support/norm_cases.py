"""A call of norm with all its arguments: by fastattn or the raw ops, by the reference in fp64 and by plain PyTorch."""

import random
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from oracle import BACKWARD, FP32_EPS, assert_accurate, exact

import fastattn
from fastattn import reference
from fastattn.ops._random import draw_rng


@dataclass
class Case:
    x: torch.Tensor
    residual: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    x_bias: torch.Tensor | None
    dy: torch.Tensor
    dr_out: torch.Tensor | None
    rms: bool = False
    eps: float = 1e-5
    dropout_p: float = 0.0
    return_residual: bool = False
    seed: int = 0
    fixed_rng: torch.Tensor | None = None  # (seed, offset); None: what the op draws after torch.manual_seed(seed)

    @property
    def inputs(self):
        return self.x, self.residual, self.weight, self.bias, self.x_bias

    @property
    def rng(self):
        if self.fixed_rng is not None or not self.dropout_p:
            return self.fixed_rng
        torch.manual_seed(self.seed)
        return draw_rng(self.x.device)

    @property
    def saves_r(self):
        """Whether r differs from x, so that the forward has to save it."""
        return self.residual is not None or self.x_bias is not None or self.dropout_p > 0

    def ours(self, inputs):
        torch.manual_seed(self.seed)
        x, residual, weight, bias, x_bias = inputs
        options = {"x_bias": x_bias, "residual": residual, "dropout_p": self.dropout_p}
        options["return_residual"] = self.return_residual
        if self.rms:
            out = fastattn.rms_norm(x, weight, self.eps, **options)
        else:
            out = fastattn.layer_norm(x, weight, bias, self.eps, **options)
        return out if self.return_residual else (out,)

    def exact(self, inputs):
        return self.by_reference(inputs)[: 1 + self.return_residual]

    def by_reference(self, inputs):
        """(y, r) of the reference, in the dtypes of the inputs."""
        options = {"eps": self.eps, "rms": self.rms, "dropout_p": self.dropout_p, "rng": self.rng}
        return reference.norm(*inputs, **options)

    def eager(self, inputs):
        """PyTorch's own ops, x in its dtype and the residual in its own."""
        x, residual, weight, bias, x_bias = inputs
        r = x if x_bias is None else x + x_bias.to(x.dtype)
        if self.dropout_p:
            row = torch.arange(x.numel() // x.shape[-1], device=x.device)
            keep = reference.philox_keep(self.rng, self.dropout_p, row, row >> 32, x.shape[-1]).view(x.shape)
            r = torch.where(keep, r * reference.dropout_scale(self.dropout_p), 0.0)
        if residual is not None:
            r = (r + residual).to(residual.dtype)
        weight, bias = (None if t is None else t.to(x.dtype) for t in (weight, bias))
        if self.rms:
            y = F.rms_norm(r.to(x.dtype), x.shape[-1:], weight, self.eps)
        else:
            y = F.layer_norm(r.to(x.dtype), x.shape[-1:], weight, bias, self.eps)
        return (y, r)[: 1 + self.return_residual]

    def check(self):
        """Check that y, r and every wanted gradient keep to the error rule."""
        grads_in = [self.dy, self.dr_out][: 1 + self.return_residual]
        results = []
        for compute, inputs in ((self.ours, self.inputs), (self.exact, exact(*self.inputs)), (self.eager, self.inputs)):
            outputs = compute(inputs)
            leaves = [t for t in inputs if t is not None and t.requires_grad]
            if not leaves:
                results.append((outputs, ()))
                continue
            flowing = [(o, g.to(o.dtype)) for o, g in zip(outputs, grads_in, strict=True) if o.requires_grad]
            flowing_outputs, grad_outputs = zip(*flowing, strict=True)
            results.append((outputs, torch.autograd.grad(flowing_outputs, leaves, grad_outputs, allow_unused=True)))
        labels = ("x", "residual", "weight", "bias", "x_bias")
        names = [n for n, t in zip(labels, self.inputs, strict=True) if _wants_grad(t)]
        for name, ours, ref, base in zip(("y", "r"), *(outputs for outputs, _ in results), strict=False):
            assert_accurate(ours, ref, base, what=name)
        slack = self.rounding_of_a_gradient() if self.x.numel() <= 100 else 0.0
        for name, ours, ref, base in zip(names, *(grads for _, grads in results), strict=True):
            assert_accurate(ours, ref, base, BACKWARD, f"gradient of {name}", slack)

    def rounding_of_a_gradient(self):
        """Some fp32 units of the terms that cancel in dr; for LayerNorm over one column nothing else is left."""
        r = replace(self, return_residual=True).exact(exact(*self.inputs))[-1].detach()
        square = (r if self.rms else r - r.mean(-1, keepdim=True)).square().mean(-1).min().item()
        weight = 1.0 if self.weight is None else self.weight.detach().abs().max().item()
        return 4 * FP32_EPS * self.dy.abs().max().item() * weight * (square + self.eps) ** -0.5

    def arguments(self):
        """The arguments of the raw ops norm_infer and norm_fwd."""
        return *self.inputs[:4], self.rng, self.dropout_p, self.eps, self.rms, self.x_bias

    def expected(self, dtype=None):
        """y, r and (dx, dresidual, dweight, dbias, dx_bias) of the reference, computed in `dtype` if given."""
        leaves = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in self.inputs]
        y, r = self.by_reference(leaves)
        outputs, douts = [y], [self.dy.to(y.dtype)]
        if self.dr_out is not None:
            outputs, douts = [y, r], [self.dy.to(y.dtype), self.dr_out.to(r.dtype)]
        wanted = [t for t in leaves if t is not None]
        grads = iter(torch.autograd.grad(outputs, wanted, douts, allow_unused=True))
        return y.detach(), r.detach(), [None if t is None else next(grads) for t in leaves]

    def statistics(self, r):
        r = r.double()
        mean = r.mean(-1)
        rstd = ((r if self.rms else r - mean[:, None]).square().mean(-1) + self.eps).rsqrt()
        return (rstd[None] if self.rms else torch.stack((mean, rstd))).float()

    def check_raw(self, kernels):
        """Check the raw ops norm_infer, norm_fwd and norm_bwd of `kernels` and return their results."""
        y, r, stats = kernels.norm_fwd(*self.arguments())
        assert torch.equal(kernels.norm_infer(*self.arguments()), y)
        y64, r64, grads64 = self.expected(torch.float64)
        y_own, r_own, grads_own = self.expected()
        assert_accurate(y, y64, y_own, what="y")
        if self.saves_r:
            assert_accurate(r, r64, r_own, what="r")
        else:
            assert r.shape == (0,)
        saved = r if self.saves_r else self.x
        torch.testing.assert_close(stats, self.statistics(saved), rtol=1e-5, atol=1e-5)
        grads = kernels.norm_bwd(
            self.dy, self.dr_out, saved, self.weight, stats, self.rng, self.dropout_p, self.rms,
            self.residual is not None, self.weight is not None, self.bias is not None, self.x_bias is not None,
        )  # fmt: skip
        names = ("dx", "dresidual", "dweight", "dbias", "dx_bias")
        for name, got, right, own in zip(names, grads, grads64, grads_own, strict=True):
            if right is None:
                assert got.shape == (0,), name
            else:
                if name == "dx_bias":  # PyTorch computes it from dx in its own dtype
                    own = grads_own[0].float().sum(0)
                own = own.to(got.dtype)  # dbias and dx_bias have the dtype of the weight
                assert_accurate(got, right, own, factor=BACKWARD, what=name)
        return y, r, stats, *grads


def rows_case(rows, cols, x=torch.float32, residual=None, *, weight=torch.float32, bias=torch.float32, x_bias=None,
              rms=False, dropout_p=0.0, dr_out=True, seed=0, device="cpu"):  # fmt: skip
    """A case of (rows, cols); the operands are given by their dtypes, None for absent ones."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape, dtype):
        return None if dtype is None else torch.randn(*shape, generator=generator).to(device, dtype)

    case = Case(
        x=randn(rows, cols, dtype=x) * 3 + 1,
        residual=randn(rows, cols, dtype=residual),
        weight=randn(cols, dtype=weight),
        bias=randn(cols, dtype=None if rms else bias),
        x_bias=randn(cols, dtype=x_bias),
        dy=randn(rows, cols, dtype=x),
        dr_out=None,
        rms=rms,
        dropout_p=dropout_p,
        fixed_rng=torch.tensor([seed * 7919 - 2**45, 2**33 + seed], device=device) if dropout_p else None,
    )
    if case.saves_r and dr_out:
        case.dr_out = randn(rows, cols, dtype=residual or x)
    return case


def _wants_grad(tensor):
    return tensor is not None and tensor.requires_grad


def strided(tensor, style):
    """The same values with other strides."""
    if style == "columns":  # a slice of a wider tensor
        wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 5), float("nan")).to(tensor)
        return wide[..., 2:-3].copy_(tensor)
    if style == "step":  # inner stride 2
        return torch.stack((tensor, tensor), -1)[..., 0]
    if style == "swapped":  # (a, b, cols) stored as (b, a, cols): rows do not collapse
        return tensor.transpose(0, 1).contiguous().transpose(0, 1) if tensor.dim() == 3 else tensor
    if style == "expanded" and tensor.dim() == 2:  # all rows share memory
        return tensor[:1].expand_as(tensor)
    return tensor


STRIDES = ("contiguous", "contiguous", "columns", "step", "swapped", "expanded")


def random_case(seed, dtypes, device="cpu"):
    """A case of any kind, which depends on the seed only."""
    choose = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    shape = choose.choice([(1,), (3,), (17,), (70,), (2, 3), (4, 1, 5), ()])
    shape = (*shape, choose.choice([1, 7, 64, 500, 1023, 1500]))
    dtype = choose.choice(dtypes)
    residual_dtype = choose.choice([None, dtype, choose.choice(dtypes)])
    rms = choose.random() < 0.5
    dropout_p = choose.choice([0.0, 0.0, 0.1, 0.5])

    def tensor(*size, dtype=dtype, shift=0.0, grad=None):
        t = strided((torch.randn(*size, generator=generator) + shift).to(dtype).to(device), choose.choice(STRIDES))
        return t.requires_grad_(choose.random() < 0.75 if grad is None else grad)

    weighted, biased = choose.random() < 0.75, not rms and choose.random() < 0.75
    return Case(
        x=tensor(*shape, shift=choose.choice([0.0, 2.0])),
        residual=None if residual_dtype is None else tensor(*shape, dtype=residual_dtype),
        weight=tensor(shape[-1], dtype=choose.choice(dtypes), shift=1.0) if weighted else None,
        bias=tensor(shape[-1], dtype=choose.choice(dtypes)) if biased else None,
        x_bias=tensor(shape[-1], dtype=choose.choice(dtypes)) if choose.random() < 0.5 else None,
        dy=tensor(*shape, grad=False),
        dr_out=tensor(*shape, dtype=residual_dtype or dtype, grad=False),
        rms=rms,
        eps=choose.choice([1e-5, 1e-3]),
        dropout_p=dropout_p,
        return_residual=choose.random() < 0.5,
        seed=seed,
    )
