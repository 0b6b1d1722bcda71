"""Tasks on a real Ray: a bounded window, stragglers rescued, deaths survived or blamed, and always an end."""

import itertools
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from data_prep.cluster import num_slots, ray_session, run_tasks
from data_prep.config import RayConfig
from tests.data_prep.cluster_jobs import executions, run

pytestmark = pytest.mark.usefixtures("ray_cluster")

QUICK = RayConfig(straggler_min_s=0.5)


def test_every_result_comes_once_and_arguments_are_read_no_further_than_the_window(tmp_path: Path) -> None:
    pulled = 0

    def arguments() -> Iterator[tuple[Any, ...]]:
        nonlocal pulled
        for number in itertools.count():
            pulled += 1
            yield tmp_path, number, "work", 0.0

    results = []
    tasks = run_tasks(run, arguments(), RayConfig(max_in_flight=3))
    for result in itertools.islice(tasks, 10):
        results.append(result)
        assert pulled - len(results) <= 3
    tasks.close()  # type: ignore[attr-defined]
    assert len({result.partition(",")[0] for result in results}) == 10


def test_no_arguments_no_results() -> None:
    assert list(run_tasks(run, [], RayConfig())) == []


def test_what_a_task_raises_arrives_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="task 1"):
        list(run_tasks(run, [(tmp_path, 0, "work"), (tmp_path, 1, "fail")], RayConfig()))


@pytest.mark.parametrize("how", ["hang once", "hang once with the lock"])
def test_a_straggler_is_overtaken_by_its_second_copy(tmp_path: Path, how: str) -> None:
    arguments = [(tmp_path, number, how if number == 7 else "work") for number in range(8)]
    results = sorted(run_tasks(run, arguments, QUICK))
    assert results == [*(f"{number}, 0" for number in range(7)), "7, 1"]


def test_a_task_that_waits_for_a_cpu_is_no_straggler(tmp_path: Path) -> None:
    config = RayConfig(max_in_flight=16, straggler_min_s=0.1, straggler_factor=4)
    list(run_tasks(run, [(tmp_path, number, "work", 0.25) for number in range(16)], config))
    assert [executions(tmp_path, number) for number in range(16)] == [1] * 16


def test_a_task_that_always_hangs_ends_the_job_with_its_inputs_named(tmp_path: Path) -> None:
    config = RayConfig(straggler_min_s=0.1, straggler_factor=1)
    arguments = [(tmp_path, number, "hang" if number == 5 else "work") for number in range(6)]
    with pytest.raises(UserError, match=r"run task 5 did not end[\s\S]*'hang'"):
        list(run_tasks(run, arguments, config))
    assert executions(tmp_path, 5) >= 2


def test_a_worker_that_died_is_replaced(tmp_path: Path) -> None:
    assert sorted(run_tasks(run, [(tmp_path, 0, "work"), (tmp_path, 1, "die once")], RayConfig())) == ["0, 0", "1, 1"]


def test_a_task_that_kills_every_worker_ends_the_job_with_its_inputs_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run task 1 took 3 workers[\s\S]*'die'"):
        list(run_tasks(run, [(tmp_path, 0, "work"), (tmp_path, 1, "die")], RayConfig()))
    assert executions(tmp_path, 1) == 3


def test_a_task_that_kills_every_worker_can_be_done_otherwise(tmp_path: Path) -> None:
    def otherwise(folder: Path, number: int, how: str) -> str:
        return f"{number} without {how}"

    results = sorted(run_tasks(run, [(tmp_path, 0, "work"), (tmp_path, 1, "die")], RayConfig(), on_death=otherwise))
    assert results == ["0, 0", "1 without die"]


def test_an_open_session_is_used() -> None:
    with ray_session(RayConfig(num_cpus=1)):
        assert num_slots() == 2


def test_a_ray_client_address_is_refused_with_the_way_out() -> None:
    script = (
        "from data_prep.cluster import ray_session; from data_prep.config import RayConfig; ray_session(RayConfig(address='ray://x:1')).__enter__()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "ray job submit" in done.stderr


ELSEWHERE = textwrap.dedent(
    """
    import os, sys, threading, time
    from pathlib import Path
    from ray.cluster_utils import Cluster
    from configs.errors import UserError
    from data_prep.cluster import ray_session, run_tasks
    from data_prep.config import RayConfig
    del os.environ["PYTHONPATH"]  # the nodes know nothing of our code

    def where(seconds):
        import data_prep
        time.sleep(seconds)
        return data_prep.__file__

    quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 300, "health_check_failure_threshold": 3}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": quick})
    config = RayConfig(address=cluster.address, max_in_flight=4)
    try:
        with ray_session(config):
            pass
    except UserError as error:
        print("said:", error.what.partition(" at ")[0])
    first = cluster.add_node(num_cpus=1)
    with ray_session(config):
        results = run_tasks(where, [(0.5,)] * 6, config)
        found = [next(results)]
        cluster.add_node(num_cpus=1)
        cluster.remove_node(first, allow_graceful=False)
        found += results
    print("said:", len(found), all(Path(file).name == "__init__.py" and file != sys.argv[1] for file in found))
    cluster.shutdown()
    """
)


def test_nodes_of_a_cluster_get_our_code_and_may_vanish(tmp_path: Path, repository: Path) -> None:
    own = str(repository / "data_prep" / "__init__.py")
    done = subprocess.run([sys.executable, "-c", ELSEWHERE, own], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    said = [line for line in done.stdout.splitlines() if line.startswith("said: ")]  # Ray talks too
    assert said == ["said: the Ray cluster", "said: 6 True"], done.stdout + done.stderr


def test_a_local_session_finds_our_code_from_any_folder(tmp_path: Path, repository: Path) -> None:
    for name in ("configs", "data_prep"):
        shutil.copytree(repository / name, tmp_path / "code" / name, ignore=shutil.ignore_patterns("__pycache__"))
    script = textwrap.dedent(
        """
        import sys
        sys.path.insert(0, sys.argv[1])
        from data_prep.cluster import ray_session, run_tasks
        from data_prep.config import RayConfig
        def where():
            import data_prep
            return data_prep.__file__
        with ray_session(RayConfig(num_cpus=1, memory_per_task_bytes=2**50)):
            print(*run_tasks(where, [()], RayConfig()))
        """
    )
    (tmp_path / "elsewhere").mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", script, str(tmp_path / "code")]
    done = subprocess.run(command, cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True, timeout=200)
    assert done.stdout == f"{tmp_path}/code/data_prep/__init__.py\n", done.stderr
    assert "may need up to 1048576 GiB for 1 tasks at once" in done.stderr
