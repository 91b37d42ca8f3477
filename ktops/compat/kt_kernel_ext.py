"""The names of KTransformers' extension module ``kt_kernel_ext`` that clients use themselves.

ktops computes with torch's threads and has no queue of tasks: these objects carry numbers of threads.
"""

from typing import NoReturn

__all__ = ["CPUInfer", "WorkerPoolConfig"]


class WorkerPoolConfig:
    """Pools of threads, as kt-kernel lays them out over NUMA nodes.

    Attributes:
        subpool_count: the number of pools.
        subpool_numa_map: the NUMA node of each.
        subpool_thread_count: the number of threads of each.
    """

    def __init__(self) -> None:
        self.subpool_count = 1
        self.subpool_numa_map = [0]
        self.subpool_thread_count = [1]


class CPUInfer:
    """Carries a number of threads; ``torch.set_num_threads`` sets those that ktops computes with.

    Args:
        threads: their number, or a WorkerPoolConfig.

    Raises:
        ValueError: the number is not positive.
    """

    def __init__(self, threads: int | WorkerPoolConfig) -> None:
        pools = threads if isinstance(threads, WorkerPoolConfig) else None
        self.num_threads = sum(pools.subpool_thread_count) if pools else int(threads)  # type: ignore[arg-type]
        if self.num_threads < 1:
            raise ValueError(f"CPUInfer: the number of threads must be positive, got {self.num_threads}")
        self.pools = pools

    def submit(self, task: object) -> NoReturn:
        """Raises NotImplementedError: there are no tasks of kt_kernel_ext.moe to run."""
        raise NotImplementedError(
            "kt_kernel_ext.CPUInfer.submit: ktops has no tasks of kt_kernel_ext.moe. Use "
            "kt_kernel.KTMoEWrapper, whose submit_forward runs in the background, or ktops.moe_sft"
        )

    def sync(self) -> None:
        """Returns at once, because no task can have been submitted."""


def __getattr__(name: str) -> NoReturn:
    raise AttributeError(
        f"ktops does not serve kt_kernel_ext.{name}: its classes hold addresses of kt-kernel's buffers. Use "
        "kt_kernel.KTMoEWrapper or ktops.moe_sft"
    )
