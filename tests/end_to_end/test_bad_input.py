"""A user's mistake is one message with what, got, expected, to fix; exit code 2; no stack; nothing half-written."""

from pathlib import Path

import pytest
from PIL import Image

from tests.end_to_end.conftest import TINY, Jetway

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


def assert_refused(done, *named: str) -> None:
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    assert "jetway:" in done.stderr
    for word in named:
        assert word in done.stderr


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["modle.decoder.width=64"], ["modle", "did you mean model"]),
        (["total_steps=many"], ["total_steps"]),
        (["parallel.tensor=3"], ["parallel.tensor=3"]),
        (["parallel.tensor=4"], ["not divisible", "parallel.tensor"]),
        (["data.global_batch_size=15"], ["data.global_batch_size=15"]),
        (["model.image.patch_size=3"], ["patch_size=3"]),
        (["data.path=nowhere"], ["nowhere", "jetway prep"]),
    ],
)
def test_training_that_cannot_work_is_refused(jetway: Jetway, digits: str, workspace: Path, overrides: list[str], named: list[str]) -> None:
    done = jetway("train", "train/digits", f"data.path={digits}", "output_dir=refused", *TINY, *overrides)
    assert_refused(done, *named)
    assert not list((workspace / "refused").rglob("step_*"))


def test_half_written_data_set_is_refused(jetway: Jetway, digits: str, workspace: Path) -> None:
    half = workspace / "half"
    (half / "shards").mkdir(parents=True)
    (half / "shards" / "train-000000.tar").write_bytes((workspace / digits / "shards" / "train-000000.tar").read_bytes())
    assert_refused(jetway("train", "train/digits", "data.path=half", "output_dir=refused", *TINY), "half-written", "jetway prep")


def test_tokenizer_of_another_data_set_is_refused(jetway: Jetway, digits: str) -> None:
    done = jetway("train", "train/digits", f"data.path={digits}", "output_dir=refused", *TINY, "model.text.num_pieces=300")
    assert_refused(done, "num_pieces")


@pytest.fixture(scope="module")
def short_run(jetway: Jetway, digits: str) -> list[str]:
    """The command of a run of two steps, which has ended."""
    command = ["train", "train/digits", f"data.path={digits}", "output_dir=short", *TINY, "total_steps=2", "parallel.processes=1"]
    done = jetway(*command)
    assert done.returncode == 0, done.stderr
    return command


def test_checkpoint_of_another_architecture_is_refused(jetway: Jetway, short_run: list[str]) -> None:
    assert_refused(jetway(*short_run, "model.decoder.mlp_dim=32", "total_steps=4"), "mlp_dim")


def test_evaluation_with_another_tokenizer_of_the_same_size_is_refused(jetway: Jetway, digits: str, short_run: list[str], workspace: Path) -> None:
    other = ["tokenizer.lower_case=false", "--input", "raw", "--output", "cased"]
    assert jetway("prep", "data/digits", *other).returncode == 0
    assert_refused(jetway("eval", "short", "data.path=cased"), "cased", "tokenizer.model")
    assert len((workspace / "short" / "eval.jsonl").read_text().splitlines()) == 1  # what training itself had found


def test_empty_folder_is_refused(jetway: Jetway, workspace: Path) -> None:
    (workspace / "empty").mkdir()
    assert_refused(jetway("prep", "--input", "empty", "--output", "from_empty"), "empty")
    assert not (workspace / "from_empty" / "manifests").exists()


def test_folder_of_broken_images_is_refused(jetway: Jetway, workspace: Path) -> None:
    (workspace / "broken").mkdir()
    for number in range(3):
        (workspace / "broken" / f"{number}.png").write_bytes(b"\x89PNG not really")
        (workspace / "broken" / f"{number}.txt").write_text("a picture")
    assert_refused(jetway("prep", "--input", "broken", "--output", "from_broken"))
    assert not (workspace / "from_broken" / "manifests").exists()


def test_folder_of_one_image_makes_a_data_set(jetway: Jetway, workspace: Path) -> None:
    (workspace / "single").mkdir()
    Image.new("RGB", (64, 64), "red").save(workspace / "single" / "one.png")
    (workspace / "single" / "one.txt").write_text("a red square")
    done = jetway("prep", "--input", "single", "--output", "from_single", "image.resolution=32")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("verb", ["eval", "sample", "caption", "export"])
def test_run_that_is_not_there_is_refused(jetway: Jetway, workspace: Path, verb: str) -> None:
    Image.new("L", (8, 8)).save(workspace / "blank.png")
    more = {"eval": [], "sample": ["--prompt", "x"], "caption": ["blank.png"], "export": ["--output", "x.safetensors"]}[verb]
    assert_refused(jetway(verb, "no_such_run", *more), "no_such_run")
