"""Folders: deterministic order, captions and JSON beside the images, one bad file costs that file."""

from collections.abc import Callable
from pathlib import Path

from data_prep.config import LimitConfig, PrepConfig
from data_prep.inputs import list_images
from data_prep.readers.base import RawSample
from data_prep.readers.folder import FolderReader


def read_all(folder: Path, config: PrepConfig) -> list[RawSample]:
    reader = FolderReader()
    return [sample for part in reader.plan(str(folder), config) for sample in reader.read(part, config)]


def test_images_are_listed_sorted_through_the_tree(tmp_path: Path) -> None:
    for name in ("b/x.PNG", "a.jpg", "b/a.webp", ".hidden.png", ".cache/c.png", "notes.txt", "README", "b/y.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert list_images(str(tmp_path)) == ["a.jpg", "b/a.webp", "b/x.PNG"]


def test_captions_labels_and_extra_fields_come_from_beside(make_folder: Callable[..., Path]) -> None:
    folder = make_folder(3)
    samples = read_all(folder, PrepConfig())
    assert [sample.source for sample in samples] == [f"raw/p{i:03d}.png" for i in range(3)]
    assert samples[1].image == (folder / "p001.png").read_bytes()
    assert samples[1].caption == "a soft picture\n  number 1 "
    assert samples[1].label == 1
    assert samples[1].extra == {"license": "mine"}


def test_the_json_gives_the_caption_where_there_is_no_text(make_folder: Callable[..., Path]) -> None:
    folder = make_folder(1)
    (folder / "p000.txt").unlink()
    (folder / "p000.json").write_text('{"caption": "from json", "label": "seven"}')
    (sample,) = read_all(folder, PrepConfig())
    assert (sample.caption, sample.label, sample.extra) == ("from json", None, {"label": "seven"})


def test_every_problem_costs_one_sample_and_has_its_reason(make_folder: Callable[..., Path]) -> None:
    folder = make_folder(7)
    (folder / "p000.json").write_text("{not json")
    (folder / "p001.json").write_text("[1, 2]")
    (folder / "p002.txt").write_bytes(b"\xff\xfe\xfa")
    (folder / "p003.txt").write_text("x" * 2000)
    (folder / "p004.png").write_bytes(bytes(60_000))
    (folder / "p005.png").unlink()
    (folder / "p005.png").symlink_to("nowhere")
    samples = read_all(folder, PrepConfig(limits=LimitConfig(max_caption_bytes=1000, max_file_bytes=50_000)))
    reasons = [sample.problem.reason if sample.problem else None for sample in samples]
    assert reasons == ["bad_json", "bad_json", "bad_caption", "caption_too_long", "file_too_large", "missing_file", None]


def test_slices_hold_at_most_a_shard(make_folder: Callable[..., Path]) -> None:
    parts = list(FolderReader().plan(str(make_folder(10)), PrepConfig(samples_per_shard=4)))
    assert [part.count for part in parts] == [4, 4, 2]
    assert [part.start for part in parts] == [0, 4, 8]
