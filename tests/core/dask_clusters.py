"""Small Dask clusters for tests, on the loopback interface only."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def cluster_of(processes: bool, failures: int = 1) -> Iterator[str]:
    """The address of a scheduler with one worker. failures: of a task, by workers that die, after which it is tried on
    another; each of these imports torch."""
    import dask
    from distributed import LocalCluster

    quiet = {"distributed.worker.profile.enabled": False, "distributed.scheduler.allowed-failures": failures}
    place = {"protocol": "tcp", "host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}
    with (
        dask.config.set(quiet),
        LocalCluster(n_workers=1, threads_per_worker=2, processes=processes, silence_logs=50, **place) as made,
    ):
        yield made.scheduler_address
