"""Tables: the same rows whichever format and wherever a slice begins; columns checked before any work."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.errors import UserError
from data_prep.config import ColumnConfig, PrepConfig
from data_prep.readers.base import RawSample
from data_prep.readers.table import TableReader
from tests.data_prep.conftest import encoded, smooth_pixels

ROWS = [{"image": f"img/{i}.png", "caption": f'number {i}, "quoted"', "label": i % 3, "score": i / 2} for i in range(11)]


def write_images(folder: Path) -> None:
    (folder / "img").mkdir(exist_ok=True)
    for number in range(11):
        (folder / "img" / f"{number}.png").write_bytes(encoded(smooth_pixels(12, 12, number)))


def write_table(folder: Path, suffix: str, rows: list[dict[str, object]] = ROWS) -> Path:
    write_images(folder)
    path = folder / f"pairs{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    elif suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    elif suffix == ".tsv":
        path.write_text("\n".join("\t".join(map(str, row)) for row in [rows[0].keys(), *(row.values() for row in rows)]))
    else:
        import csv

        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def read_all(path: Path, config: PrepConfig) -> list[RawSample]:
    reader = TableReader()
    return [sample for part in reader.plan(path, config) for sample in reader.read(part, config)]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("size", [1, 4, 100])
def test_every_format_gives_the_same_samples_in_slices_of_any_size(tmp_path: Path, suffix: str, size: int) -> None:
    path = write_table(tmp_path, suffix)
    samples = read_all(path, PrepConfig(samples_per_shard=size))
    assert [sample.source for sample in samples] == [f"pairs{suffix}#{i}" for i in range(11)]
    assert [sample.caption for sample in samples] == [row["caption"] for row in ROWS]
    assert [sample.label for sample in samples] == [row["label"] for row in ROWS]
    assert [float(sample.extra["score"]) for sample in samples] == [row["score"] for row in ROWS]
    assert samples[7].image == (tmp_path / "img" / "7.png").read_bytes()


def test_quoted_newlines_do_not_shift_the_slices(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"image": f"img/{i}.png", "caption": "line\n" * (i + 1) + "ü"} for i in range(7)]
    samples = read_all(write_table(tmp_path, ".csv", rows), PrepConfig(samples_per_shard=2))
    assert [sample.caption for sample in samples] == [row["caption"] for row in rows]


def test_columns_can_be_renamed(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"file": "img/1.png", "text": "hello"}]
    config = PrepConfig(columns=ColumnConfig(image="file", caption="text"))
    (sample,) = read_all(write_table(tmp_path, ".jsonl", rows), config)
    assert (sample.caption, sample.problem) == ("hello", None)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_missing_column_is_named_with_a_suggestion(tmp_path: Path, suffix: str) -> None:
    rows: list[dict[str, object]] = [{"images": "img/1.png", "caption": "hello"}]
    with pytest.raises(UserError, match=r"no column 'image'[\s\S]*columns.image=images"):
        read_all(write_table(tmp_path, suffix, rows), PrepConfig())


def test_parquet_may_hold_the_bytes(tmp_path: Path) -> None:
    data = encoded(smooth_pixels(12, 12))
    rows: list[dict[str, object]] = [{"image": {"bytes": data, "path": "a.png"}, "caption": "x"}]
    (sample,) = read_all(write_table(tmp_path, ".parquet", rows), PrepConfig())
    assert sample.image == data
    assert sample.extra == {}


def test_bad_rows_cost_themselves(tmp_path: Path) -> None:
    path = write_table(tmp_path, ".jsonl")
    lines = path.read_text().splitlines()
    lines[1], lines[2], lines[3] = "{broken", json.dumps({"image": "img/none.png"}), json.dumps({"image": "https://x/y.jpg", "caption": "c"})
    lines[4] = json.dumps({"image": None, "caption": "c"})
    path.write_text("\n".join(lines))
    samples = read_all(path, PrepConfig(samples_per_shard=3))
    reasons = [sample.problem.reason if sample.problem else "" for sample in samples]
    assert reasons == ["", "bad_json", "missing_file", "missing_file", "missing_file", *[""] * 6]
    assert samples[3].problem is not None
    assert "not a local file" in samples[3].problem.detail


def test_foreign_values_become_plain_json(tmp_path: Path) -> None:
    import datetime

    rows: list[dict[str, object]] = [{"image": "img/1.png", "caption": "c", "when": datetime.date(2024, 2, 3), "nan": float("nan"), "raw": b"\0"}]
    (sample,) = read_all(write_table(tmp_path, ".parquet", rows), PrepConfig())
    assert sample.extra == {"when": "2024-02-03", "nan": None, "raw": None}


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_stray_carriage_return_costs_nothing(tmp_path: Path, suffix: str, end: str) -> None:
    write_images(tmp_path)
    comma = "," if suffix == ".csv" else "\t"
    rows = [comma.join(row) for row in (("caption", "image"), ("one\rtwo", "img/0.png"), ("three", "img/1.png"))]
    (tmp_path / f"pairs{suffix}").write_bytes((end.join(rows) + end).encode())
    samples = read_all(tmp_path / f"pairs{suffix}", PrepConfig(samples_per_shard=1))
    assert [sample.caption for sample in samples] == ["one two", "three"]
    assert [sample.image for sample in samples] == [(tmp_path / "img" / f"{i}.png").read_bytes() for i in range(2)]
