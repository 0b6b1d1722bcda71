"""The plan: every sample once, in a fixed order, stored and read back unchanged."""

from collections.abc import Callable
from pathlib import Path

import pytest

from configs.errors import UserError
from data_prep.plan import Plan, differences, make_plan
from data_prep.storage import open_storage
from tests.data_prep.conftest import small_config


def test_every_sample_is_in_one_task(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    plan = make_plan(small_config(make_folder(19), tmp_path / "out"))
    names = [name for task in plan.tasks for span in task.spans for name in span.part.names]
    assert names == [f"p{i:03d}.png" for i in range(19)]
    assert [span.first_sample for task in plan.tasks for span in task.spans] == [0, 8, 16]
    assert plan.num_samples == 19


def test_small_inputs_share_a_task(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    folders = [make_folder(3, name=f"f{i}") for i in range(5)]
    plan = make_plan(small_config(folders[0], tmp_path / "out", inputs=tuple(map(str, folders))))
    assert [task.num_samples for task in plan.tasks] == [6, 6, 3]
    assert [span.first_sample for task in plan.tasks for span in task.spans] == [0, 3, 6, 9, 12]


def test_stored_plan_is_read_back_unchanged(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_folder(9)
    (folder / "ümlaut \udcff.png").write_bytes(b"a name that is not UTF-8")
    plan, storage = make_plan(small_config(folder, tmp_path / "out")), open_storage(tmp_path / "out")
    assert Plan.load(storage, 1) is None
    plan.dump(storage)
    assert Plan.load(storage, 1) == plan
    plan.dump(storage)  # the same again is no conflict


def test_of_two_plans_for_one_generation_the_second_is_refused(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "out")
    make_plan(small_config(make_folder(3), tmp_path / "out")).dump(storage)
    other = make_plan(small_config(make_folder(4), tmp_path / "out"))
    with pytest.raises(UserError, match="another run has begun generation 1"):
        other.dump(storage)


def test_a_folder_of_tars_or_tables_counts_as_those(tmp_path: Path) -> None:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for name in ("b.jsonl", "sub/a.jsonl"):
        (tmp_path / "in" / name).write_text('{"image": "x.png", "caption": "c"}\n')
    plan = make_plan(small_config(tmp_path / "in", tmp_path / "out"))
    assert [Path(span.part.path).name for task in plan.tasks for span in task.spans] == ["b.jsonl", "a.jsonl"]


@pytest.mark.parametrize(("name", "message"), [("nothing", "does not exist"), ("empty", "no samples"), ("file.xyz", "no known kind")])
def test_unusable_inputs_are_named(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.xyz").write_text("")
    with pytest.raises(UserError, match=message):
        make_plan(small_config(tmp_path / name, tmp_path / "out"))


def test_differences_name_every_changed_setting() -> None:
    old, new = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 5}, "d": 4}
    assert differences(old, new) == ["a.c: 2 -> 5", "d: 3 -> 4"]
