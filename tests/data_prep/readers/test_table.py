"""Tables: the same rows whichever format and wherever a slice begins; columns checked before any work."""

import gzip
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.errors import UserError
from data_prep import inputs
from data_prep.config import ColumnConfig, PrepConfig
from data_prep.readers.base import RawSample
from data_prep.readers.table import TableReader
from data_prep.storage import open_storage
from tests.data_prep.conftest import encoded, smooth_pixels
from tests.data_prep.s3_proxy import s3_proxy

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


def compressed(path: Path) -> Path:
    packed = path.with_name(f"{path.name}.gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    return packed


def read_all(path: Path, config: PrepConfig) -> list[RawSample]:
    reader = TableReader()
    return [sample for part in reader.plan(str(path), config) for sample in reader.read(part, config)]


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


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_an_empty_table_is_called_that(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"list{suffix}"
    path.touch()
    with pytest.raises(UserError, match="names no columns"):
        list(TableReader().plan(str(path), PrepConfig()))


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
    assert reasons == ["", "bad_json", "missing_file", "", "missing_file", *[""] * 6]
    assert samples[3].url == "https://x/y.jpg", "an address is left to the downloader"


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


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_compressed_tables_read_like_plain_ones(tmp_path: Path, suffix: str) -> None:
    plain = write_table(tmp_path, suffix)
    packed = compressed(plain)
    config = PrepConfig(samples_per_shard=4)
    assert [sample.image for sample in read_all(packed, config)] == [sample.image for sample in read_all(plain, config)]


def test_a_compressed_table_that_is_cut_off_is_refused_when_it_is_planned(tmp_path: Path) -> None:
    packed = compressed(write_table(tmp_path, ".jsonl"))
    packed.write_bytes(packed.read_bytes()[:-40])
    with pytest.raises(UserError, match="cut off"):
        read_all(packed, PrepConfig())


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_chosen_rows_keep_their_numbers_and_the_others_are_not_read(tmp_path: Path, suffix: str) -> None:
    path = write_table(tmp_path, suffix)
    for number in (4, 6, 8):
        (tmp_path / "img" / f"{number}.png").unlink()
    part = list(TableReader().plan(str(path), PrepConfig(samples_per_shard=8)))[0]
    samples = list(TableReader().read(replace(part, rows=(1, 5, 7)), PrepConfig()))
    assert [(sample.number, sample.caption, sample.problem) for sample in samples] == [(i, ROWS[i]["caption"], None) for i in (1, 5, 7)]


def test_a_url_list_names_addresses_and_carries_every_other_column(tmp_path: Path) -> None:
    rows = [{"url": f" https://host/{i}.jpg", "caption": f"c{i}", "similarity": i / 10, "nsfw": "UNLIKELY"} for i in range(5)]
    path = write_table(tmp_path, ".parquet", rows)
    samples = read_all(path, PrepConfig(samples_per_shard=2))
    assert [sample.url for sample in samples] == [f"https://host/{i}.jpg" for i in range(5)]
    assert [sample.number for sample in samples] == [0, 1, 0, 1, 0]
    assert samples[3].extra == {"similarity": 0.3, "nsfw": "UNLIKELY"}
    assert not samples[3].image


def test_an_address_that_is_none_is_dropped(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"url": url, "caption": "c"} for url in ("not an address", None, "", "img/none.png", "file:///nowhere/1.png")]
    reasons = [sample.problem.reason for sample in read_all(write_table(tmp_path, ".jsonl", rows), PrepConfig()) if sample.problem]
    assert reasons == ["bad_url"] * 5


def test_addresses_of_a_table_on_this_machine_may_be_files(tmp_path: Path) -> None:
    write_images(tmp_path)
    (tmp_path / "img" / "a b.png").write_bytes(b"content")
    urls = ("img/1.png", str(tmp_path / "img" / "2.png"), f"file://{tmp_path}/img/3.png", f"file://{tmp_path}/img/a%20b.png")
    rows: list[dict[str, object]] = [{"url": url, "caption": "c"} for url in urls]
    samples = read_all(write_table(tmp_path, ".csv", rows), PrepConfig())
    images = [(tmp_path / "img" / name).read_bytes() for name in ("1.png", "2.png", "3.png", "a b.png")]
    assert [(sample.image, sample.url, sample.problem) for sample in samples] == [(image, None, None) for image in images]


def test_addresses_name_no_file_outside_the_folder_of_their_list(tmp_path: Path) -> None:
    folder = tmp_path / "list"
    folder.mkdir()
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"not for training")
    urls = (f"file://{secret}", str(secret), "../secret.png", "img/../../secret.png", "file://../secret.png", f"file://{folder}/%2e%2e/secret.png")
    rows: list[dict[str, object]] = [{"url": url, "caption": "c"} for url in urls]
    samples = read_all(write_table(folder, ".jsonl", rows), PrepConfig())
    assert [sample.problem.reason if sample.problem else sample.image for sample in samples] == ["bad_url"] * 6
    named = read_all(folder / "pairs.jsonl", PrepConfig(columns=ColumnConfig(image="url")))  # a column of files may name any
    assert [sample.image for sample in named[:3]] == [b"not for training"] * 3


@pytest.mark.parametrize("kind", ["device", "pipe"])
def test_what_is_no_regular_file_costs_one_sample(tmp_path: Path, kind: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    rows: list[dict[str, object]] = [{"image": {"device": "/dev/zero", "pipe": "pipe"}[kind], "caption": "c"}, {"image": "img/1.png", "caption": "c"}]
    samples = read_all(write_table(tmp_path, ".jsonl", rows), PrepConfig())
    assert [sample.problem.reason if sample.problem else "" for sample in samples] == ["unreadable", ""]


def test_values_that_python_cannot_hold_cost_no_other_row(tmp_path: Path) -> None:
    write_images(tmp_path)
    starts = pa.py_buffer(b"".join(offset.to_bytes(4, "little") for offset in (0, 2, 6)))
    captions = pa.StringArray.from_buffers(2, starts, pa.py_buffer(b"okno\xff\xfe"))
    columns = {"image": ["img/0.png", "img/1.png"], "caption": captions, "time": pa.array([0, 2**62], type=pa.timestamp("us"))}
    pq.write_table(pa.table(columns), tmp_path / "odd.parquet")
    samples = read_all(tmp_path / "odd.parquet", PrepConfig())
    assert [(sample.caption, sample.extra["time"]) for sample in samples] == [("ok", "1970-01-01 00:00:00"), ("no\ufffd\ufffd", None)]


def test_a_deeply_nested_column_costs_its_row(tmp_path: Path) -> None:
    write_images(tmp_path)
    rows = [f'{{"image": "img/0.png", "caption": "c", "tree": {"[" * depth}{"]" * depth}}}' for depth in (5, 900, 90_000)]
    (tmp_path / "deep.jsonl").write_text("\n".join(rows))
    samples = read_all(tmp_path / "deep.jsonl", PrepConfig())
    assert [sample.problem.reason if sample.problem else "" for sample in samples] == ["", "bad_json", "bad_json"]


def test_addresses_of_a_remote_table_may_not_be_files(tmp_path: Path, s3_url: str) -> None:
    urls = (f"file://{tmp_path}/img/1.png", "img/1.png", "/etc/hostname", "https://host/1.jpg")
    rows: list[dict[str, object]] = [{"url": url, "caption": "c"} for url in urls]
    open_storage(f"{s3_url}/tables").put_bytes("urls.jsonl", write_table(tmp_path, ".jsonl", rows).read_bytes())
    (part,) = TableReader().plan(f"{s3_url}/tables/urls.jsonl", PrepConfig())
    samples = list(TableReader().read(part, PrepConfig()))
    assert [sample.problem.reason for sample in samples if sample.problem] == ["bad_url"] * 3
    assert samples[3].url == "https://host/1.jpg"


def test_a_remote_table_names_remote_images_and_nothing_of_this_machine(tmp_path: Path, s3_url: str) -> None:
    rows: list[dict[str, object]] = [{"image": "img/1.png", "caption": "c"}, {"image": "/etc/hostname", "caption": "c"}]
    rows += [{"image": "../1.png", "caption": "c"}] + [{"image": f"img/{i}.png", "caption": "c"} for i in range(2, 9)]
    storage = open_storage(f"{s3_url}/tables")
    for suffix in (".jsonl", ".parquet"):
        storage.put_bytes(f"pairs{suffix}", write_table(tmp_path, suffix, rows).read_bytes())
        path = f"{s3_url}/tables/pairs{suffix}"
        samples = [sample for part in TableReader().plan(path, PrepConfig(samples_per_shard=3)) for sample in TableReader().read(part, PrepConfig())]
        assert [sample.url for sample in samples[:1] + samples[3:]] == [f"{s3_url}/tables/img/{i}.png" for i in range(1, 9)]
        assert [sample.problem.reason for sample in samples[1:3] if sample.problem] == ["missing_file", "missing_file"]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_rows_of_a_large_remote_table_are_read_without_those_before_them(
    tmp_path: Path, s3_url: str, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    count = 20_000
    noise = [hashlib.sha256(str(i).encode()).hexdigest() * 4 for i in range(count)]  # that no page of a Parquet file packs
    columns = {"url": [f"https://host/{text}.jpg" for text in noise], "caption": [f"c{i}" for i in range(count)]}
    path = tmp_path / f"large{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table(columns), path, row_group_size=1000)
    elif suffix == ".csv":
        path.write_text("url,caption\n" + "".join(f"{url},{caption}\n" for url, caption in zip(*columns.values(), strict=True)))
    else:
        path.write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in zip(*columns.values(), strict=True)))
    url = f"{s3_url}/tables/large{suffix}"
    open_storage(f"{s3_url}/tables").put_file(path, path.name)
    parts = list(TableReader().plan(url, PrepConfig(samples_per_shard=500)))
    monkeypatch.setattr(inputs, "FIRST_READ", 2**16)
    with s3_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        samples = list(TableReader().read(parts[-1], PrepConfig()))
        assert [sample.caption for sample in samples] == [f"c{i}" for i in range(19_500, 20_000)]
        assert samples[-1].url == columns["url"][-1]
        assert 100_000 < proxy.num_bytes < path.stat().st_size / 5


PLANNING = """
import resource, sys
from data_prep.config import PrepConfig
from data_prep.readers.table import TableReader
from data_prep.storage import open_storage
next(TableReader().plan(sys.argv[1], PrepConfig()), None)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = sum(part.count for part in TableReader().plan(sys.argv[1], PrepConfig()))
print(rows, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_planning_a_long_list_takes_no_memory(tmp_path: Path, suffix: str) -> None:
    count = 100_000
    path = tmp_path / f"long{suffix}"
    urls = [f"https://host/{i}-{'x' * 100}.jpg" for i in range(count)]
    if suffix == ".parquet":
        pq.write_table(pa.table({"url": urls, "caption": urls}), path, row_group_size=10_000)
    else:
        path.write_text("url,caption\n" + "".join(f"{url},{url}\n" for url in urls))
    done = subprocess.run([sys.executable, "-c", PLANNING, str(path)], capture_output=True, text=True, check=True)
    rows, megabytes = map(int, done.stdout.split())
    assert rows == count
    assert megabytes < 12, "a list of 25 MB is never held"
