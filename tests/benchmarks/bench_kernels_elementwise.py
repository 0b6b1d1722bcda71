"""Kernels bound by memory bandwidth: bytes that must move, over the time, as a share of what a copy reaches.

Letters: B examples, I image tokens, C subpixels of a patch, S positions, D width, H head width, F hidden units, K mixtures, d soft channels.
"""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.kernels.dispatch import choose
from tests.benchmarks.bench_checks import compare_with_reference
from tests.benchmarks.bench_device import Device, Timing, share
from tests.benchmarks.bench_section import Context, Section, breaks_device, describe_error

Leaves = dict[str, Tensor]
BANDWIDTH_AIM = 0.8
HEAD = ["operation", "implementation", "median us", "fastest us", "spread", "GB/s", "of copy", "of a copy of as many bytes"]


@dataclass(frozen=True, slots=True)
class Case:
    """One operation at one shape."""

    name: str
    operation: str
    """Field of `KernelsConfig`."""
    shape: str
    leaves: Leaves
    run: Callable[[str, Leaves], tuple[Tensor, ...]]
    """(implementation, inputs) -> outputs."""
    forward_bytes: float
    """Inputs read once, outputs written once."""
    backward_bytes: float = 0.0
    """0: there is none."""
    best: str = ""
    """The implementation to measure; empty: what `auto` takes."""

    def results(self, impl: str, dtype: torch.dtype | None = None) -> Leaves:
        """Outputs and gradients, by name; the gradients of the outputs are the same for all."""
        leaves = {name: _leaf(value, dtype) for name, value in self.leaves.items()}
        outputs = self.run(impl, leaves)
        found = {f"output {number}": output.detach() for number, output in enumerate(outputs)}
        if self.backward_bytes:
            wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
            grads = torch.autograd.grad(outputs, list(wanted.values()), _output_gradients(outputs))
            found |= {f"gradient of {name}": grad for name, grad in zip(wanted, grads, strict=True)}
        return found

    def check(self, impl: str) -> str:
        """Compares with the reference at this shape.

        Raises:
            AssertionError: less exact than eager torch.
        """
        dtype = next(leaf.dtype for leaf in self.leaves.values() if leaf.is_floating_point())
        wide = torch.float32 if dtype == torch.bfloat16 else torch.float64
        return compare_with_reference(self.results(impl), lambda: self.results("reference"), lambda: self.results("reference", wide), dtype=dtype)

    def actions(self, impl: str) -> dict[str, Callable[[], object]]:
        """Forward, and backward where there is one, on inputs of their own: an implementation may write over them."""
        leaves = {name: _leaf(value, None) for name, value in self.leaves.items()}
        run = torch.compile(self.run, dynamic=False) if impl == "compiled" else self.run
        name = "reference" if impl == "compiled" else impl
        if not self.backward_bytes:
            return {"forward": lambda: run(name, leaves)}
        outputs = run(name, leaves)
        wanted, gradients = [leaf for leaf in leaves.values() if leaf.requires_grad], _output_gradients(outputs)
        return {"forward": lambda: run(name, leaves), "backward": lambda: torch.autograd.grad(outputs, wanted, gradients, retain_graph=True)}


def elementwise(context: Context, section: Section) -> None:
    """All cases; one that fails is a line, the others go on."""
    rows: list[list[str]] = []
    failed: list[BaseException] = []
    copies: dict[int, Timing] = {}
    for build in CASES:
        try:
            for case in build(context):
                _measure(context, section, case, rows, copies)
        except Exception as error:
            if breaks_device(error):
                raise
            failed.append(error)
            section.item("checks", f"**{build.__name__} failed**: {describe_error(error)}")
        context.device.release()
    section.text("note", "GB/s: bytes that must move (inputs once, outputs once) over the median. `compiled`: torch.compile of the reference.")
    if failed:
        raise failed[0]


def _measure(context: Context, section: Section, case: Case, rows: list[list[str]], copies: dict[int, Timing]) -> None:
    device = context.device
    dtype = next(leaf.dtype for leaf in case.leaves.values() if leaf.is_floating_point())
    best = case.best or choose(case.operation, "auto", device.device, dtype)
    agreement = "only the reference runs here" if best == "reference" else f"`{best}` {case.check(best)}"
    section.item("checks", f"{case.name}: {case.shape}; {agreement}")
    with_compiler = case.backward_bytes > 0 and (not context.small or case.operation == "rope") and context.seconds_left > 20
    names = list(dict.fromkeys([best, *(["compiled"] if with_compiler else []), "reference"]))
    actions = {(name, way): action for name in names for way, action in case.actions(name).items()}
    found = device.compare({f"{name}/{way}": action for (name, way), action in actions.items()}, seconds=context.repeat_seconds(1.0))
    for way, size in (("forward", case.forward_bytes), ("backward", case.backward_bytes)):
        for name in names:
            if (name, way) not in actions:
                continue
            timing = found[f"{name}/{way}"]
            key = int(size) // 2
            copies[key] = copies.get(key) or device.copy_timing(key)
            speed = size / timing.median
            of_copy = speed / device.peaks.copy_bytes
            times = [f"{1e6 * timing.median:.1f}", f"{1e6 * timing.fastest:.1f}", f"{timing.spread:.0%}"]
            alike = share(copies[key].median, timing.median)
            rows.append([f"{case.name} {way}", name, *times, f"{speed / 1e9:.3g}", f"{of_copy:.0%}", alike])
            if case.name == "affine_coupling" and name == best and not context.small:
                section.bar(f"{case.name} {way}, share of copy bandwidth", aim=BANDWIDTH_AIM, found=of_copy, at_least=True, unit="")
    section.table("table", HEAD, rows)


def rms_norm(context: Context) -> Iterator[Case]:
    """Alone, and after the residual addition with dropout."""
    from model.kernels.rms_norm import interface
    from model.kernels.splitmix import DropoutKey

    batch, length, width = (4, 33, 96) if context.small else (64, 321, 1536)
    draw = _drawer(context.device)
    leaves = {"x": draw(batch, length, width), "scale": draw(width)}
    size = _bytes(leaves["x"])
    shape = f"x [{batch}, {length}, {width}] {_name(leaves['x'])}"
    yield Case("rms_norm", "rms_norm", shape, leaves, lambda impl, x: (interface.rms_norm(x["x"], x["scale"], impl=impl),), 2 * size, 3 * size)
    leaves = {"x": draw(batch, length, width), "branch": draw(batch, length, width), "scale": draw(width)}
    dropout = DropoutKey(torch.arange(batch, device=context.device.device) * 7919, 0.1)

    def run(impl: str, x: Leaves) -> tuple[Tensor, ...]:
        return interface.add_dropout_rms_norm(x["x"], x["branch"], x["scale"], dropout, impl=impl)

    yield Case("add_dropout_rms_norm", "rms_norm", shape, leaves, run, 4 * size, 5 * size)


def layer_norm(context: Context) -> Iterator[Case]:
    """Of the flow's ViT blocks: the stream in fp32, the branch and the norm in the dtype of the products."""
    from model.kernels.layer_norm.interface import add_layer_norm

    batch, tokens, width = (4, 16, 96) if context.small else (128, 256, 512)
    draw = _drawer(context.device)
    leaves = {"branch": draw(batch, tokens, width), "x": draw(batch, tokens, width, dtype=torch.float32), "weight": draw(width), "bias": draw(width)}

    def run(impl: str, x: Leaves) -> tuple[Tensor, ...]:
        return add_layer_norm(x["x"], x["branch"], x["weight"], x["bias"], out_dtype=x["branch"].dtype, impl=impl)

    wide, narrow = _bytes(leaves["x"]), _bytes(leaves["branch"])
    shape = f"x [{batch}, {tokens}, {width}] fp32, branch {_name(leaves['branch'])}"
    # Backward: the sum, its gradient and that of the norm; those of x and of the branch, which are one tensor in fp32.
    backward = 3 * wide + 2 * narrow if narrow < wide else 4 * wide
    yield Case("add_layer_norm", "layer_norm", shape, leaves, run, 2 * wide + 2 * narrow, backward)


def rope(context: Context) -> Iterator[Case]:
    """Queries, as the projection leaves them: heads between positions and channels."""
    from model.decoder.rope import rope_tables
    from model.kernels.rope.interface import apply_rope

    batch, heads, length, head_dim = (4, 4, 33, 24) if context.small else (64, 16, 321, 96)
    leaves = {"x": _drawer(context.device)(batch, length, heads, head_dim)}
    cos, sin = rope_tables(torch.arange(length, device=context.device.device)[None], head_dim)
    size = _bytes(leaves["x"])

    def run(impl: str, x: Leaves) -> tuple[Tensor, ...]:
        return (apply_rope(x["x"].transpose(1, 2), cos, sin, impl=impl),)

    shape = f"x [{batch}, {heads}, {length}, {head_dim}] {_name(leaves['x'])}, strided"
    yield Case("rope", "rope", shape, leaves, run, 2 * size, 2 * size)


def geglu(context: Context) -> Iterator[Case]:
    """The decoder's gated activation."""
    interface = importlib.import_module("model.kernels.geglu.interface")
    batch, length, hidden = (4, 33, 384) if context.small else (32, 321, 6144)
    draw = _drawer(context.device)
    leaves = {"gate": draw(batch, length, hidden), "up": draw(batch, length, hidden)}
    size = _bytes(leaves["up"])
    shape = f"gate, up [{batch}, {length}, {hidden}] {_name(leaves['up'])}"
    case = Case("geglu", "geglu", shape, leaves, lambda impl, x: (interface.geglu(x["gate"], x["up"], impl=impl),), 3 * size, 5 * size)
    yield case
    if choose("geglu", "auto", context.device.device, context.device.dtype) == "liger":
        yield replace(case, best="triton")


def mixture_sample(context: Context) -> Iterator[Case]:
    """One draw under guidance: two rows of hidden states per image, 2d rows of the head each."""
    from model.kernels.mixture_sample.interface import mixture_sample as draw_token

    device, draw = context.device, _drawer(context.device)
    width, mixtures, soft_dim = (64, 16, 8) if context.small else (1536, 1024, 128)
    weight = draw(mixtures, 2, soft_dim, width, std=0.3 * width**-0.5).detach()
    bias = draw(mixtures, 2, soft_dim).detach()
    for batch in (1, 4) if context.small else (1, 16, 256):
        component = (torch.arange(batch, device=device.device) * 37) % mixtures
        leaves = {
            "hidden": draw(2 * batch, width).detach(),
            "noise": torch.randn(batch, soft_dim, device=device.device, generator=torch.Generator(device.device).manual_seed(1)),
            "weight": weight,
            "bias": bias,
        }

        def run(impl: str, x: Leaves, component: Tensor = component) -> tuple[Tensor, ...]:
            return (draw_token(x["hidden"], x["weight"], x["bias"], component, x["noise"], cfg_scale=3.0, cfg_rule="clipped", impl=impl),)

        shape = f"B={batch}, D={width}, K={mixtures}, d={soft_dim} {_name(weight)}, guided, `clipped`"
        yield Case(f"mixture_sample B={batch}", "mixture_sample", shape, leaves, run, batch * 2 * soft_dim * width * weight.element_size())


def affine_coupling(context: Context) -> Iterator[Case]:
    """As between two couplings (two halves out), and as the last one (one tensor out)."""
    from model.kernels.affine_coupling.interface import affine_coupling as couple

    device = context.device.device
    batch, tokens, channels = (4, 16, 48) if context.small else (128, 256, 768)
    draw, half = _drawer(context.device), channels // 2
    order = torch.randperm(channels, generator=torch.Generator().manual_seed(3)).to(device=device, dtype=torch.int32)
    inverse_order = torch.argsort(order).to(torch.int32)
    leaves = {name: draw(batch, tokens, half, dtype=torch.float32) for name in ("first", "second")}
    leaves["params"] = draw(batch, tokens, channels, dtype=torch.float32)
    size = _bytes(leaves["first"])
    for joined in (False, True):

        def run(impl: str, x: Leaves, joined: bool = joined) -> tuple[Tensor, ...]:
            out, logdet = couple(*x.values(), order, inverse_order, joined=joined, impl=impl)
            return *out, logdet

        shape = f"[{batch}, {tokens}, {channels}] fp32, {'one tensor' if joined else 'two halves'} out"
        name = "affine_coupling joined" if joined else "affine_coupling"
        # Forward: x1, x2, b, a and y; backward: the gradient of y, the saved x2, b and a, and the gradients of x1, of x2 and b (one), of a.
        yield Case(name, "affine_coupling", shape, leaves, run, 6 * size, 8 * size)


CASES: list[Callable[[Context], Iterator[Case]]] = [affine_coupling, rms_norm, layer_norm, rope, geglu, mixture_sample]


def _drawer(device: Device) -> Callable[..., Tensor]:
    generator = torch.Generator(device.device).manual_seed(0)

    def draw(*shape: int, std: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, device=device.device, dtype=dtype or device.dtype).normal_(0.0, std, generator=generator).requires_grad_()

    return draw


def _leaf(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    if not value.is_floating_point():
        return value
    copied = value.detach().clone() if dtype is None or value.dtype != torch.bfloat16 and dtype == torch.float32 else value.detach().to(dtype)
    return copied.requires_grad_(value.requires_grad)


def _output_gradients(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Numbers that bf16 holds exactly, and no two neighbours alike."""
    grads = []
    for output in outputs:
        ramp = torch.arange(output.numel(), device=output.device) % 127 - 63
        grads.append((ramp / 64.0).to(output.dtype).view(output.shape))
    return grads


def _bytes(x: Tensor) -> float:
    return float(x.numel() * x.element_size())


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.").replace("bfloat16", "bf16").replace("float32", "fp32")
