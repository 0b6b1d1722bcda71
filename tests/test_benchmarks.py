"""What the benchmarks of kernels and steps compute before and after they measure: no time is looked at."""

import argparse
import math
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.loader import load_config
from model import init
from model.batch import Batch
from pipeline.config import RunConfig
from tests.benchmarks import bench_kernels, bench_runner
from tests.benchmarks.bench_checks import compare_with_reference, relative_error
from tests.benchmarks.bench_device import Device, Timing, gibibytes
from tests.benchmarks.bench_heads import HeadProblem, gmm_problem, text_problem
from tests.benchmarks.bench_kernels_elementwise import CASES
from tests.benchmarks.bench_plot import log_log_plot
from tests.benchmarks.bench_sampling import share_alike
from tests.benchmarks.bench_section import Context, Section, describe_error, scrub
from tests.benchmarks.bench_step import batches_of, search, variants
from tests.benchmarks.bench_step_loop import OBJECTIVE, REFERENCE, EngineStep, PlainStep, largest_micro_batch, miniature, published, run_config
from tests.benchmarks.bench_step_profile import Span, idle_share, kind_of, next_bottleneck, shorten, sum_by

CONTEXT = Context(device=Device(), small=True)


@pytest.mark.parametrize("size", ["350m", "1p3b"])
def test_measured_models_are_the_published_ones(size: str) -> None:
    model = load_config(RunConfig, f"train/image_text_{size}").model
    assert published(size) == replace(model, objective=OBJECTIVE)
    assert replace(OBJECTIVE, order=model.objective.order) == model.objective


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 8, 13, 100, 255, 256, 1000])
@pytest.mark.parametrize("start", [1, 4, 8])
def test_search_ends_within_an_eighth_below_the_largest_that_fits(limit: int, start: int) -> None:
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= limit

    found = largest_micro_batch(fits, start=start, most=256, may_go_on=lambda: True)
    largest = min(limit, 256)
    assert found in tried
    assert found <= largest <= found + max(1, found // 8)
    assert len(tried) == len(set(tried))


def test_search_stops_with_the_best_so_far_when_time_is_up() -> None:
    turns = iter([True, True, False, False, False])
    assert largest_micro_batch(lambda size: True, start=4, most=256, may_go_on=lambda: next(turns)) == 8
    assert largest_micro_batch(lambda size: False, start=4, most=256, may_go_on=lambda: True) == 0


def test_idle_share_counts_overlapping_kernels_once() -> None:
    spans = [Span("a", 0.0, 2.0), Span("b", 1.0, 2.0), Span("c", 1.5, 0.5), Span("d", 9.0, 1.0)]
    assert math.isclose(idle_share(spans), 0.6)
    assert idle_share(list(reversed(spans))) == idle_share(spans)
    assert idle_share([Span("a", 5.0, 1.0)]) == 0.0


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_NNT", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>", "matrix products"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<96>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x64_1x4x1_kernel0_0", "attention"),
        ("void cudnn::fusion::compute_dot_do_o_specialized<true, __nv_bfloat16, 128, 64>", "attention"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", "elementwise"),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>", "sums and norms"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimiser"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("triton_poi_fused_add_mul_0", "compiled by torch"),
        ("rms_norm_fwd_kernel", "our kernels"),
    ],
)
def test_kernels_are_known_by_their_names(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_every_triton_kernel_of_ours_is_known_as_ours(repository: Path) -> None:
    names = []
    for path in sorted((repository / "model" / "kernels").rglob("triton_kernels.py")):
        lines = path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines):
            # A kernel is launched with [grid]; the others are called by kernels.
            if line.startswith("def ") and lines[number - 1].startswith("@triton.jit"):
                name = line[4:].partition("(")[0]
                names += [name] if f"{name}[" in path.read_text(encoding="utf-8") else []
    assert names
    assert {name: kind_of(name) for name in names} == dict.fromkeys(names, "our kernels")


def test_next_bottleneck_is_the_largest_part_besides_products_and_attention() -> None:
    spans = [Span("gemm", 0.0, 6.0), Span("flash_fwd", 6.0, 2.0), Span("at::native::reduce_kernel", 8.0, 0.5), Span("rms_norm_bwd_kernel", 8.5, 1.5)]
    kinds, names = sum_by(spans, lambda span: kind_of(span.name)), sum_by(spans, lambda span: span.name)
    assert "our kernels, 15%" in next_bottleneck(kinds, names, idle=0.01)
    assert "rms_norm_bwd_kernel" in next_bottleneck(kinds, names, idle=0.01)
    assert "waits for the host 40%" in next_bottleneck(kinds, names, idle=0.4)
    assert len(shorten("x" * 300)) == 80


def test_timing_says_median_fastest_and_spread() -> None:
    timing = Timing((1.0, 2.0, 4.0))
    assert (timing.median, timing.fastest, timing.spread) == (2.0, 1.0, 1.5)
    assert timing.cells() == ["2000.000", "1000.000", "150%"]
    assert (gibibytes(2**31), gibibytes(2**20)) == ("2.00 GiB", "1.0 MiB")


def test_turns_alternate_and_every_action_gets_as_many() -> None:
    calls: list[str] = []
    found = Device().compare({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, seconds=0.0, warm_up=1)
    assert calls == ["a", "b", "a", "b", "b", "a", "a", "b", "b", "a", "a", "b"]
    assert {name: len(timing.seconds) for name, timing in found.items()} == {"a": 5, "b": 5}


def test_peak_of_a_cpu_is_what_an_action_held_at_once() -> None:
    def action() -> None:
        for _ in range(3):
            torch.ones(2**24)  # 64 MiB

    assert 60 * 2**20 < Device().peak_bytes(action) < 90 * 2**20


def test_plot_is_wellformed_and_has_every_line() -> None:
    lines = {"<fused>": [(512, 10.0), (1024, 11.0)], "eager": [(512, 300.0), (1024, 0.0)], "none": []}
    root = ElementTree.fromstring(log_log_plot("memory & time", lines, x_label="N", y_label="MiB"))
    texts = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"<fused>", "eager", "memory & time", "512", "1024"} <= texts
    assert "none" not in texts
    assert len(list(root.iter("{http://www.w3.org/2000/svg}circle"))) == 3


def test_section_survives_saving_and_an_error_names_no_folder(tmp_path: Path) -> None:
    section = Section("title", tmp_path / "section.json")
    section.item("list", "one")
    section.item("list", "two")
    section.table("table", ["a"], [["1"]])
    section.table("table", ["a"], [["1"], ["2"]])
    section.bar("speed", aim=0.8, found=0.9, at_least=True, unit="")
    folder = "/" + "home/somebody"
    with pytest.raises(ValueError) as raised:
        raise ValueError(f"cannot open {folder}/code/file.cu: 3 images/s and/or 5")
    section.fail(raised.value)
    assert describe_error(raised.value) == section.error
    loaded = Section.load(tmp_path / "section.json")
    assert loaded.lines() == section.lines()
    assert loaded.bars == section.bars
    text = "\n".join(loaded.lines())
    assert "- one\n- two" in text
    assert "| 2 |" in text
    assert "cannot open file.cu: 3 images/s and/or 5" in text
    assert "test_benchmarks.py" in text
    assert scrub(f"({folder}/x.py) `{folder}/y`") == "(x.py) `y`"


def _heads() -> list[HeadProblem]:
    return [
        gmm_problem(Device(), tokens=37, width=24, mixtures=8, soft_dim=4, workspace_bytes=2**12),
        text_problem(Device(), tokens=37, width=24, vocab=50, workspace_bytes=2**12),
    ]


@pytest.mark.parametrize("problem", _heads(), ids=lambda problem: problem.name)
def test_reference_in_chunks_is_the_whole_reference(problem: HeadProblem) -> None:
    whole, chunks = problem.results("reference", torch.float64), problem.results("reference", torch.float64, chunk=5)
    assert whole.keys() == chunks.keys()
    assert {"nll", "gradient of hidden"} <= whole.keys()
    assert len(whole) == 1 + len(problem.leaves)
    for name in whole:
        assert relative_error(chunks[name], whole[name]) < 1e-6, name


@pytest.mark.parametrize("problem", _heads(), ids=lambda problem: problem.name)
def test_head_is_checked_and_its_products_are_the_counted_ones(problem: HeadProblem) -> None:
    assert "checked against the reference" in problem.check("torch")
    for product in problem.products().values():
        product()
    outputs = sum(leaf.shape[0] if leaf.dim() < 3 else leaf.shape[:-1].numel() for name, leaf in problem.leaves.items() if "weight" in name)
    assert outputs == problem.outputs
    assert problem.flops == 2 * 37 * 24 * outputs


def test_wrong_result_is_refused() -> None:
    truth = {"y": torch.linspace(1, 2, 100, dtype=torch.float64)}
    eager: Callable[[], dict[str, torch.Tensor]] = lambda: {"y": truth["y"].float()}  # noqa: E731
    compare_with_reference({"y": truth["y"].float()}, eager, lambda: truth, dtype=torch.float32)
    for wrong in (truth["y"].float() * (1 + 1e-4), torch.full((100,), math.nan), torch.full((100,), math.inf)):
        with pytest.raises(AssertionError, match="wrong, and so not timed"):
            compare_with_reference({"y": wrong}, eager, lambda: truth, dtype=torch.float32)


@pytest.mark.parametrize("build", CASES, ids=lambda build: build.__name__)
def test_every_case_runs_and_agrees_with_itself(build: Callable) -> None:
    for case in build(CONTEXT):
        assert "checked against the reference" in case.check("reference")
        for action in case.actions("reference").values():
            action()


def test_model_of_other_kernels_trains_the_same_weights() -> None:
    config = run_config(CONTEXT, miniature(), micro_batches=2, kernels=REFERENCE)
    first = PlainStep(config, CONTEXT.device)
    fused = replace(config, kernels=replace(REFERENCE, gmm_nll="torch", linear_cross_entropy="torch"))
    second = PlainStep(fused, CONTEXT.device, like=first)
    batches = batches_of(CONTEXT, config.model, 4, 2)
    before = first.gradient_norm(batches)
    assert second.gradient_norm(batches) == pytest.approx(before, rel=1e-4)
    second.run(batches)
    after = first.gradient_norm(batches)
    assert after[0] < before[0]
    assert second.gradient_norm(batches) == pytest.approx(after, rel=1e-4)


def test_plain_loop_goes_on_after_a_step_that_did_not_fit() -> None:
    config = run_config(CONTEXT, miniature(), micro_batches=2, kernels=REFERENCE)
    step = PlainStep(config, CONTEXT.device)
    batches = batches_of(CONTEXT, config.model, 4, 2)
    expected = step.gradient_norm(batches)

    def fail(*_: object) -> None:
        raise RuntimeError("CUDA out of memory. (not really)")

    for register in (step.stage._layers[-1].register_forward_hook, step.weights.parameters[0].register_hook):
        hook = register(fail)
        with pytest.raises(RuntimeError, match="out of memory") as raised:
            step.run(batches)
        assert CONTEXT.device.is_out_of_memory(raised.value)
        hook.remove()
        step.recover()
        assert step.gradient_norm(batches) == expected


def test_engine_goes_on_after_a_step_that_did_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init, "initialise", init.initialise)  # put back what the step replaces
    device = Device()
    device.dtype = torch.bfloat16
    context = replace(CONTEXT, device=device)
    config = run_config(context, miniature(), micro_batches=2)
    step = EngineStep(config)
    batches = batches_of(context, config.model, 4, 2)
    expected = float(step.run(batches))
    parameters, calls = list(step.stage.parameters()), []

    def fail(*_: object) -> None:
        calls.append(0)
        if len(calls) % 2 == 0:  # in the second micro-batch
            raise RuntimeError("CUDA out of memory. (not really)")

    for register in (step.stage._layers[-1].register_forward_hook, parameters[0].register_hook, parameters[-1].register_hook):
        hook = register(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            step.run(batches)
        hook.remove()
        step.recover()
        assert float(step.run(batches)) == pytest.approx(expected, rel=1e-3)


def test_plain_loop_updates_as_adamw_on_clipped_gradients() -> None:
    config = run_config(CONTEXT, miniature(), micro_batches=2, kernels=REFERENCE)
    step = PlainStep(config, CONTEXT.device)
    batches = batches_of(CONTEXT, config.model, 4, 2)
    copies = [parameter.detach().clone().requires_grad_() for parameter in step.weights.parameters]
    step.losses(batches)
    for copy, total in zip(copies, step.weights.sums, strict=True):
        copy.grad = total.clone()
    norm = torch.nn.utils.clip_grad_norm_(copies, config.optimizer.gradient_clipping)
    settings = config.optimizer
    decay = {id(master): group["weight_decay"] for group in step.weights.optimizer.param_groups for master in group["params"]}
    groups = [{"params": [c], "weight_decay": decay[id(m)]} for c, m in zip(copies, step.weights.masters, strict=True)]
    torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(settings.beta1, settings.beta2), eps=settings.eps).step()
    assert float(step.weights.update(settings.gradient_clipping)) == pytest.approx(float(norm), rel=1e-5)
    for copy, parameter in zip(copies, step.weights.parameters, strict=True):
        assert torch.allclose(copy, parameter, rtol=1e-5, atol=1e-7)
    assert all(not total.any() for total in step.weights.sums)


def test_search_says_whether_a_larger_micro_batch_may_fit() -> None:
    class Step:
        def run(self, batches: list[Batch]) -> None:
            if len(batches[0]) > 2:
                raise RuntimeError("CUDA out of memory. (not really)")

        def recover(self) -> None:
            pass

    context = replace(CONTEXT, deadline=time.monotonic() + 3600)
    step: Any = Step()
    largest = search(context, step, miniature(), start=2, seconds=600.0)
    assert (largest.size, largest.is_whole, str(largest)) == (2, True, "2")
    assert largest.seconds > 0
    hurried = search(context, step, miniature(), start=2, seconds=0.0)
    assert (hurried.size, hurried.is_whole, str(hurried)) == (0, False, "not known, as the time ran out")


def test_ways_of_other_kernels_need_only_begin_with_the_same_token() -> None:
    model: Any = object()
    soft = torch.randn(4, 20, 6, generator=torch.Generator().manual_seed(0))
    other = soft.clone()
    other[:, 1:] += 1.0
    assert share_alike(model, soft, []) == 1.0
    assert share_alike(model, other, [(object(), soft)]) == 1.0  # type: ignore[list-item]
    assert share_alike(model, other, [(object(), other), (model, soft)]) == 0.0  # type: ignore[list-item]
    other[:2, 0] += 1.0
    assert share_alike(model, other, [(object(), soft)]) == 0.5  # type: ignore[list-item]


def test_ablation_adds_one_part_per_row() -> None:
    found = variants(CONTEXT, miniature())
    assert found[0].changes == {}
    for variant in found[1:]:
        if variant.same_loss:
            ((operation, chosen),) = variant.changes.items()
            assert getattr(REFERENCE, operation) != chosen
            assert operation in variant.name
    assert [variant.padded for variant in found if not variant.same_loss] == [True, False, False]
    assert [batch.padded for batch in batches_of(CONTEXT, miniature(), 4, 2, padded=True)] == [True, True]


def test_a_failing_section_is_reported_and_the_next_one_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {
        "broken": bench_runner.Entry("tests.benchmarks.no_such_module:f", "Broken", 1.0),
        "peaks": bench_runner.SECTIONS["peaks"],
    }
    monkeypatch.setattr(bench_runner, "SECTIONS", entries)
    given = argparse.Namespace(child=tmp_path, sections="broken,peaks", small=True, budget=0.1, seconds=60.0)
    assert bench_runner.run_child(given) == 0
    broken, peaks = (Section.load(tmp_path / f"{name}.json") for name in entries)
    assert broken.is_done
    assert "ModuleNotFoundError" in (broken.error or "")
    assert peaks.error is None
    assert any("matrix product" in line for line in peaks.lines())


def test_runner_keeps_what_was_measured_and_leaves_with_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a real child, whose registry knows no section of this name: it dies, and the report still holds the section before."""
    monkeypatch.setitem(bench_runner.SECTIONS, "unknown", bench_runner.Entry("no:where", "Unknown to the child", 5.0))
    report = tmp_path / "report.md"
    assert bench_runner.main(["--small", "--sections", "peaks,unknown", "--report", str(report)], default=(), name="gpu", doc=None) == 1
    text = report.read_text(encoding="utf-8")
    assert "matrix product" in text
    assert "**Failed**: its process ended with status 1" in text
    assert str(tmp_path) not in text
    assert "failed: unknown" in capsys.readouterr().err


def test_after_an_error_of_the_device_the_next_section_has_a_new_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Child:
        returncode = bench_runner.GAVE_UP

        def poll(self) -> int:
            return self.returncode

        def wait(self, timeout: float) -> None:
            pass

    def start(command: list[str], **_: object) -> Child:
        names = command[command.index("--sections") + 1].split(",")
        started.append(names)
        folder = Path(command[command.index("--child") + 1])
        (folder / "machine").write_text("a GPU", encoding="utf-8")
        error = "RuntimeError: Triton Error [CUDA]: an illegal memory access" if names[0] == "gmm" else None
        for name in names[:1] if error else names:
            Section(name, folder / f"{name}.json", error=error, is_done=True).save()
        return Child()

    started: list[list[str]] = []
    monkeypatch.setattr(bench_runner.subprocess, "Popen", start)
    given = argparse.Namespace(small=True, budget=0.1, seconds=60.0)
    runner = bench_runner.Runner(["gmm", "cross-entropy", "elementwise"], given, tmp_path / "report.md", "")
    assert runner.run() == 1
    assert started == [["gmm", "cross-entropy", "elementwise"], ["cross-entropy", "elementwise"]]
    assert [name for name, section in runner.sections.items() if section.error] == ["gmm"]


@pytest.mark.parametrize(
    ("message", "status"), [("CUDA error: an illegal memory access was encountered", bench_runner.GAVE_UP), ("CUDA out of memory.", 0)]
)
def test_a_child_gives_up_after_an_error_of_the_device_alone(message: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(context: Context, section: Section) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(bench_kernels, "peaks", fail)
    given = argparse.Namespace(child=tmp_path, sections="peaks", small=True, budget=0.1, seconds=60.0)
    assert bench_runner.run_child(given) == status


def test_without_a_gpu_nothing_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    report = tmp_path / "report.md"
    assert bench_runner.main(["--report", str(report)], default=tuple(bench_runner.SECTIONS), name="gpu", doc=None) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert not report.exists()


def test_all_sections_fit_into_eight_minutes() -> None:
    assert sum(entry.seconds for entry in bench_runner.SECTIONS.values()) <= 480


def test_a_report_of_some_sections_has_a_name_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths: list[Path] = []
    monkeypatch.setattr(bench_runner, "REPORTS", tmp_path)
    monkeypatch.setattr(bench_runner.Runner, "run", lambda self: paths.append(self.path) or 0)
    for sections in ([], ["--sections", "gmm,peaks"]):
        bench_runner.main(["--small", *sections], default=("peaks", "gmm"), name="kernels", doc="")
    assert [path.name[len("2026-01-01-") :] for path in paths] == ["kernels-cpu-small.md", "kernels-cpu-small-gmm-peaks.md"]
