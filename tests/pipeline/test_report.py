"""The report shows all that the run's folder holds, misses nothing loudly, and asks nothing of the network."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from configs.errors import UserError
from pipeline.config import RunConfig
from pipeline.report.__main__ import main
from pipeline.report.build import CHARTS, build_report
from pipeline.report.chart import MAX_POINTS, Chart, Line, render_chart
from pipeline.tracker import METRICS, Tracker

VOID = {"meta", "link", "img", "br", "input"}


class Outline(HTMLParser):
    """Checks nesting, and collects text and what the page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.loads += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def outline(page: Path) -> Outline:
    parsed = Outline()
    parsed.feed(page.read_text(encoding="utf-8"))
    assert parsed.open == []
    return parsed


def full_run(run: Path) -> None:
    config = RunConfig(name="<digits> & co")
    tracker = Tracker(run, config, session={"world_size": 2})
    tracker = Tracker(run, config, resumed_step=0, session={"world_size": 4})
    keys = [key for _, _, sources in CHARTS for key, _, file in sources if file == METRICS]
    for step in range(1, 301):
        tracker.log({"step": step, "samples": step * 64, **dict.fromkeys(keys, 1.0 + step % 7)})
    for step in (100, 200):
        tracker.log_eval({"step": step, "image_bits": 5.75, "text_nats": 0.5})
        tracker.save_samples(step, torch.zeros(2, 8, 8, 1, dtype=torch.uint8), ["draw <b>seven</b>", "eight"])
        caption = {"key": "k", "caption": f"written at {step}", "reference": "the digit 7", "correct": True}
        tracker.save_captions(step, [caption], torch.zeros(1, 8, 8, 1, dtype=torch.uint8))
    (run / "summary.json").write_text(json.dumps({"generated_digit_accuracy": 0.984}))


def test_everything_in_the_folder_is_shown(tmp_path: Path) -> None:
    full_run(tmp_path)
    page = build_report(tmp_path)
    assert page == tmp_path / "report.html"
    parsed, source = outline(page), page.read_text(encoding="utf-8")
    text = " ".join(parsed.text)
    for title, _, _ in CHARTS:
        assert title in text
    assert source.count('<figure class="chart"') == len(CHARTS)
    for expected in ("<digits> & co", "98.4%", "draw <b>seven</b>", "written at 200", "the digit 7", "held out", "global_batch_size: 64", "torch"):
        assert expected in text, expected
    assert "written at 100" not in text  # only the last captions
    assert source.count("resumed at step 0") == len(CHARTS)
    assert (base64.b64encode((tmp_path / "samples" / "step_00000200.png").read_bytes()).decode()) in source


def test_nothing_is_asked_of_the_network(tmp_path: Path) -> None:
    full_run(tmp_path)
    page = build_report(tmp_path)
    assert outline(page).loads
    assert all(load.startswith("data:") for load in outline(page).loads)
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttp", page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("kept", ["metrics.jsonl", "config.yaml", "provenance.json", "eval.jsonl"])
def test_missing_pieces_are_left_out(kept: str, tmp_path: Path) -> None:
    full_run(tmp_path / "full")
    run = tmp_path / "part"
    run.mkdir()
    (run / kept).write_bytes((tmp_path / "full" / kept).read_bytes())
    parsed = outline(build_report(run))
    assert "Images drawn from text" not in " ".join(parsed.text)


def test_damaged_pieces_do_not_stop_it(tmp_path: Path) -> None:
    full_run(tmp_path)
    (tmp_path / "provenance.json").write_text('{"sessions": [{"step": "x", "git": 3, "time": "never"}, 7]}')
    (tmp_path / "summary.json").write_text("{")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 301, "loss": null, "grad_norm": "high"}\n{"step": 302, "lo')
    (tmp_path / "samples" / "step_00000200.json").unlink()
    outline(build_report(tmp_path))


def test_an_empty_folder_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="no run in this folder"):
        build_report(tmp_path)
    assert main([str(tmp_path)]) == 2
    assert "no run in this folder" in capsys.readouterr().err


def test_the_command_prints_the_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full_run(tmp_path)
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")


def coordinates(svg: str) -> list[tuple[float, float]]:
    return [tuple(map(float, pair.split(","))) for points in re.findall(r'points="([^"]+)"', svg) for pair in points.split()]  # type: ignore[misc]


@pytest.mark.parametrize(
    "values",
    [[1.0], [0.0, 0.0, 0.0], [-3.0, 5.0], [1e-9, 1e9], [5.0] * 500, [1.0] * 400 + [1e12] + [1.0] * 400, [1e-300, 1e300], [-1e-12, 1e-12]],
)
def test_lines_stay_inside_the_picture_whatever_the_values(values: list[float]) -> None:
    for may_be_log in (False, True):
        svg = render_chart(Chart("t", "u", [Line("l", list(enumerate(values)))], may_be_log=may_be_log))
        assert all(0 <= x <= 560 and 0 <= y <= 250 for x, y in coordinates(svg))
        assert len(re.findall('class="tick"', svg)) >= 2


def test_a_higher_value_is_drawn_higher() -> None:
    (x0, y0), (x1, y1) = coordinates(render_chart(Chart("t", "u", [Line("l", [(0, 1.0), (10, 2.0)])])))
    assert x1 > x0
    assert y1 < y0


def test_a_spike_does_not_flatten_the_curve() -> None:
    points = [(step, 1.0 + (step % 10) / 10) for step in range(1000)]
    points[500] = (500, 1e6)
    ys = [y for _, y in coordinates(render_chart(Chart("t", "u", [Line("l", points)])))]
    assert max(ys) - min(ys) > 100
    assert sorted(ys)[-1] - sorted(ys)[len(ys) // 10] > 50


def test_long_lines_are_thinned_but_keep_their_extremes() -> None:
    points = [(step, float(step % 97)) for step in range(20_000)]
    points[12_345] = (12_345, 98.5)
    svg = render_chart(Chart("t", "u", [Line("l", points)]))
    assert len(coordinates(svg)) <= 2 * (MAX_POINTS + 2)
    assert "98.5" in svg


def test_a_chart_without_points_is_nothing() -> None:
    assert render_chart(Chart("t", "u", [Line("l", [])])) == ""
