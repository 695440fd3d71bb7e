"""Options of commands that several processes may run together."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Together:
    """Mixed into a command's options. TPU pods, Slurm and Open MPI need none of them."""

    coordinator: str | None = None
    """HOST:PORT of process 0, where several processes that run the same command meet; or
    JAX_COORDINATOR_ADDRESS, as JAX_NUM_PROCESSES and JAX_PROCESS_ID."""
    num_processes: int | None = None
    process_id: int | None = None
    """Which of them this is, from 0."""
    meeting_timeout: int = 300
    """Seconds to wait for the others."""

    def meet(self) -> None:
        """Waits for the other processes, if there are any; before anything is asked of jax."""
        from jaxsd import processes

        processes.initialize(
            self.coordinator, self.num_processes, self.process_id, self.meeting_timeout
        )


# What says where a command runs, not what it does.
NAMES = tuple(field.name for field in dataclasses.fields(Together))
