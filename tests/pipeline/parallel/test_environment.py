"""A process finds its rank under torchrun, under srun, and alone."""

import pytest

from configs.errors import UserError
from pipeline.parallel.environment import ProcessEnvironment


def test_without_variables_a_process_is_alone() -> None:
    environment = ProcessEnvironment.detect({})
    assert (environment.rank, environment.world_size, environment.master_addr) == (0, 1, None)


def test_torchrun_wins_over_slurm() -> None:
    environment = ProcessEnvironment.detect(
        {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}
    )
    assert (environment.rank, environment.local_rank, environment.world_size, environment.master_port) == (3, 1, 4, 29500)


def test_srun_step_gives_rank_and_a_port_of_the_job() -> None:
    variables = {
        "SLURM_PROCID": "5",
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_ID": "0",
        "SLURM_JOB_ID": "123",
        "MASTER_ADDR": "10.0.0.1",
    }
    environment = ProcessEnvironment.detect(variables)
    assert (environment.rank, environment.local_rank, environment.world_size) == (5, 1, 8)
    assert (environment.master_addr, environment.master_port, environment.launcher) == ("10.0.0.1", 20123, "srun")


def test_a_batch_script_is_one_process_although_slurm_names_many_tasks() -> None:
    assert ProcessEnvironment.detect({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "9"}).world_size == 1


def test_broken_variable_is_a_user_error() -> None:
    with pytest.raises(UserError, match="WORLD_SIZE"):
        ProcessEnvironment.detect({"RANK": "0", "WORLD_SIZE": "many", "MASTER_ADDR": "a", "MASTER_PORT": "1"})
    with pytest.raises(UserError, match="MASTER_ADDR"):
        ProcessEnvironment.detect({"RANK": "0", "WORLD_SIZE": "2"})
