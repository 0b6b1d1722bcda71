"""Ray: a session on this machine or on a cluster, and a bounded number of tasks at a time, each of which ends."""

from data_prep.cluster.session import num_slots, ray_session
from data_prep.cluster.tasks import run_tasks

__all__ = ["num_slots", "ray_session", "run_tasks"]
