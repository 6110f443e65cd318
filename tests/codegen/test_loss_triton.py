"""The Triton cut cross-entropy: against the reference in Triton's interpreter, and compiled without a GPU."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

from smelt.codegen import loss_cuda, loss_triton
from smelt.codegen.loss_cuda import TritonKernels
from smelt.codegen.loss_triton import FILTER, TILES, Tile, TritonLoss, covers, signatures
from smelt.ir.errors import SmeltError
from smelt.ir.ops import loss as loss_op
from smelt.ir.ops.loss import HEAD_CROSS_ENTROPY, head_cross_entropy

from .triton_checks import INTERPRETED, compiled, in_the_interpreter, interpreted

pytest.importorskip("triton")

SMALL = Tile(tokens=16, words=32, columns=16, warps=4)
SHAPES = [(1, 1, 1), (16, 32, 16), (17, 70, 33), (37, 129, 20)]
TOLERANCE = {torch.float32: 5e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}  # of the largest entry


def problem(n, v, k, dtype=torch.float32, device="cpu", sharp=1.0):
    """x, weight, labels (every fifth ignored) and bias; `sharp` makes the likeliest words likelier."""
    random = torch.Generator().manual_seed(n + v)
    x, weight, bias = (torch.randn(*shape, generator=random) for shape in ((n, k), (v, k), (v,)))
    labels = torch.randint(v, (n,), generator=random)
    labels[1::5] = -100
    x, weight, bias = ((value * sharp).to(device, dtype).requires_grad_() for value in (x, weight, bias))
    return [x, weight, labels.to(device), bias]


def results(call, given, **options):
    """The losses, and the gradients of their mean weighted by place."""
    value = call(*given, **options)
    weights = torch.linspace(1, 2, len(value), device=value.device)
    leaves = [tensor for tensor in given if tensor is not None and tensor.requires_grad]
    return [value.detach(), *torch.autograd.grad((value * weights).mean(), leaves)]


def errors(given, loss, **options):
    """The largest differences of loss and gradients from the reference, as parts of the largest entry."""
    got, want = results(loss, given, **options), results(head_cross_entropy, given, **options)
    assert [x.dtype for x in got] == [x.dtype for x in want]
    differences = [(g - w).abs().nan_to_num(nan=torch.inf).max() for g, w in zip(got, want, strict=True)]
    return [float(d / w.abs().max().clamp(min=1e-3)) for d, w in zip(differences, want, strict=True)]


@interpreted
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("softcap", "programs"), [(None, 264), (5.0, 1)])
def test_the_kernels_compute_the_reference(shape, softcap, programs, monkeypatch):
    monkeypatch.setattr(loss_triton, "PROGRAMS", programs)  # 1: the vocabulary is not parted
    assert max(errors(problem(*shape), TritonLoss(tile=SMALL), softcap=softcap)) < TOLERANCE[torch.float32]


@interpreted
def test_halves_and_no_bias():
    """A mean over tokens, whose gradients would vanish in float16 if they were not scaled."""
    x, weight, labels, _ = problem(37, 129, 20, torch.float16)
    assert max(errors([x, weight, labels, None], TritonLoss(tile=SMALL))) < TOLERANCE[torch.float16]
    tiny = [value * 1e-6 for value in results(lambda *a: TritonLoss(tile=SMALL)(*a) * 1e6, [x, weight, labels, None])]
    assert float(tiny[1].abs().max()) > 0


@interpreted
def test_only_what_is_asked_for_has_a_gradient():
    x, weight, labels, bias = problem(17, 70, 33)
    for given in ([x, weight.detach(), labels, None], [x.detach(), weight, labels, bias.detach()]):
        assert max(errors(given, TritonLoss(tile=SMALL))) < TOLERANCE[torch.float32]


@interpreted
def test_blocks_without_weight_are_skipped():
    given = problem(37, 320, 20, sharp=3.0)
    exact = results(TritonLoss(tile=SMALL), given)
    filtered = results(TritonLoss(FILTER, SMALL), given)
    assert torch.equal(exact[0], filtered[0]) and torch.equal(exact[3], filtered[3])
    for a, b in zip(exact[1:3], filtered[1:3], strict=True):
        assert 0 < float((a - b).abs().max()) < 37 * FILTER * float(a.abs().max())
    for gradient in results(TritonLoss(2.0, SMALL), given)[1:3]:  # no entry reaches 2
        assert float(gradient.abs().max()) == 0


@interpreted
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("part * span, tl", "part * span + BV * part, tl"),  # a dropped block
        ("added * tl.exp(peak - higher)", "added"),
        ("share - 1.0", "share - 0.95"),
        ("1 - (s / softcap) * (s / softcap)", "1"),
        ("tl.load(to, mask=inside, other=0) + more", "more"),
    ],
)
def test_the_comparison_catches_a_wrong_kernel(monkeypatch, right, wrong):
    assert right in loss_triton.KERNELS
    monkeypatch.setattr(loss_triton, "PROGRAMS", 6)  # two parts of more than one block
    monkeypatch.setattr(loss_triton, "KERNELS", loss_triton.KERNELS.replace(right, wrong))
    assert max(errors(problem(37, 129, 20), TritonLoss(tile=SMALL), softcap=5.0)) > 100 * TOLERANCE[torch.float32]


class Counted(TritonKernels):
    """Kernels that note how often they run, and scale what they give."""

    def __init__(self, by=1.0):
        super().__init__(SMALL if INTERPRETED else None)
        self.by, self.calls = by, []

    def loss(self, *given):
        self.calls.append("loss")
        return super().loss(*given)

    def gradients(self, *given):
        self.calls.append("gradients")
        return tuple(each if each is None else each * self.by for each in super().gradients(*given))


@interpreted
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_op_takes_the_kernels_of_a_device(softcap, monkeypatch):
    """As `register` does it for CUDA devices: forward and backward, by the op that training calls."""
    for by, right in ((1.0, True), (1.05, False)):
        kernels = Counted(by)
        monkeypatch.setitem(loss_op.KERNELS, "cpu", kernels)
        worst = max(errors(problem(17, 70, 33), HEAD_CROSS_ENTROPY.target, softcap=softcap))
        assert (worst < TOLERANCE[torch.float32]) is right and kernels.calls == ["loss", "gradients"]


@interpreted
def test_the_op_keeps_its_blocks_for_what_the_kernels_do_not_cover(monkeypatch):
    kernels = Counted()
    monkeypatch.setitem(loss_op.KERNELS, "cpu", kernels)
    given = problem(17, 70, 33)
    given[0] = given[0].detach().double().requires_grad_()
    value = HEAD_CROSS_ENTROPY.target(*given)
    assert not kernels.calls and value.isfinite().all()


def test_kernels_are_registered_for_cuda_devices_once(monkeypatch):
    monkeypatch.setattr(loss_op, "KERNELS", {})
    loss_cuda.register()
    first = loss_op.KERNELS["cuda"]
    loss_cuda.register()
    assert {"cuda": first} == loss_op.KERNELS and isinstance(first, TritonKernels)


@compiled
def test_everything_holds_in_the_interpreter():
    in_the_interpreter(__file__)


@compiled
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_kernels_compile_for_a_gpu_without_spilling(dtype, capability, tmp_path, monkeypatch):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    kernels = TritonLoss().kernels
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    for name, types in signatures(dtype, bias=True).items():
        function, tile = getattr(kernels, name), TILES[dtype.itemsize][name != "forward"]
        constants = {"SOFTCAP": True, "BIAS": True, "BN": tile.tokens, "BV": tile.words, "BK": tile.columns}
        # as PyTorch allocates them, and rows of a model's width
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, argument in enumerate(function.arg_names)
            if "*" in types[argument] or argument == "K"
        }
        source = ASTSource(function, types, constants, aligned)
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert made.metadata.shared <= 99 * 1024  # what a block may have on every card since sm_80
        (tmp_path / "kernel.cubin").write_bytes(made.asm["cubin"])
        dump = [tools / "cuobjdump", "--dump-resource-usage", tmp_path / "kernel.cubin"]
        usage = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
        assert re.search(r"REG:\d+ STACK:0 ", usage), (name, usage)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_the_kernels_compute_the_reference_on_a_gpu(dtype, softcap):
    given = problem(300, 5000, 200, dtype, "cuda", sharp=0.5)
    assert max(errors(given, TritonLoss(), softcap=softcap)) < 10 * TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_op_takes_the_kernels_on_a_gpu(dtype, monkeypatch):
    kernels = Counted()
    monkeypatch.setitem(loss_op.KERNELS, "cuda", kernels)
    assert max(errors(problem(300, 1000, 96, dtype, "cuda"), HEAD_CROSS_ENTROPY.target)) < TOLERANCE[dtype]
    assert kernels.calls == ["loss", "gradients"]


@pytest.mark.gpu
def test_no_logits_are_held_on_a_gpu():
    n, v, k = 4096, 32768, 512
    given = [*problem(n, v, k, torch.bfloat16, "cuda")[:3], None]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results(TritonLoss(FILTER), given)
    assert torch.cuda.max_memory_allocated() - before < 8 * (n + v) * k < 2 * n * v


def test_it_says_what_it_does_not_cover():
    x, weight, labels, _ = problem(5, 7, 3)
    assert covers(x, weight) is None
    with pytest.raises(SmeltError, match=r"x and weight must share .* not torch\.float32 and torch\.float16"):
        TritonLoss()(x, weight.half(), labels)
    with pytest.raises(SmeltError, match=r"x \[N, K\] and weight \[V, K\] are needed"):
        TritonLoss()(x[:, :2], weight, labels)
