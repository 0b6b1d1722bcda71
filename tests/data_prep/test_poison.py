"""A picture that kills its decoder costs itself, not the job."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.schema import Manifest
from data_prep.storage import open_storage
from tests.data_prep.conftest import encoded, files_below, smooth_pixels

FAULTY_DECODER = """
import os, signal
import simplejpeg
decode = simplejpeg.decode_jpeg

def faulty(data, *arguments, **options):
    if b"kills the decoder" in data:
        os.kill(os.getpid(), signal.SIGKILL)
    return decode(data, *arguments, **options)

simplejpeg.decode_jpeg = faulty
"""

DRIVER = """
import sys
from pathlib import Path
from data_prep.prepare import prepare
from tests.data_prep.conftest import small_config
prepare(small_config(Path(sys.argv[1]), Path(sys.argv[2]), samples_per_shard=4))
"""


@pytest.mark.slow
def test_the_task_is_done_in_isolation_after_its_worker_has_died_three_times(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(FAULTY_DECODER)
    folder = tmp_path / "raw"
    folder.mkdir()
    for number in range(10):
        comment = b"kills the decoder" if number == 5 else b"a comment"
        (folder / f"{number}.jpg").write_bytes(encoded(smooth_pixels(40, 40, number), "JPEG", comment=comment))
        (folder / f"{number}.txt").write_text("a picture")
    path = os.pathsep.join([str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH"), os.getcwd()])])
    command = [sys.executable, "-c", DRIVER, str(folder), str(tmp_path / "set")]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    counts = Manifest.load(open_storage(tmp_path / "set")).counts
    assert (counts.kept, counts.dropped) == (9, {"corrupt": 1})
    assert b"it killed the decoder" in files_below(tmp_path / "set")["ledger/000001/failures-000001.jsonl"]
