"""One job of several processes: how they find each other, wait for each other, and end together.

`jax.distributed` does the work. It knows SLURM, Open MPI up to version 4, Kubernetes and Cloud TPUs
by itself; here are the plain environment variables that it does not read, and what a user sees when
one of the processes is lost.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from flux_jax.errors import UserError, exit_on_user_error

logger = logging.getLogger(__name__)

# A process that is silent for so long is lost. JAX's own 100 s would leave the others waiting.
_HEARTBEAT_SECONDS = 30
_START_SECONDS = 300
_END_SECONDS = 120

# What a lost process leaves behind in the others, as JAX tells it.
_LOST = ("Gloo", "NCCL", "Connection", "coordination service", "DEADLINE_EXCEEDED", "UNAVAILABLE")

_VARIABLES = {
    "coordinator_address": ("COORDINATOR_ADDRESS",),
    # Open MPI 5 no longer says where its first process is, and JAX does not find out.
    "num_processes": ("NUM_PROCESSES", "OMPI_COMM_WORLD_SIZE"),
    "process_id": ("PROCESS_ID", "OMPI_COMM_WORLD_RANK"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """The processes of a job, seen from one of them; by default, one alone.

    Attributes:
      index: of this process.
      count: of all.
    """

    index: int = 0
    count: int = 1

    @classmethod
    def here(cls) -> Processes:
        """As JAX has it, which starts its backend."""
        return cls(index=jax.process_index(), count=jax.process_count())

    @property
    def first(self) -> bool:
        """Whether this one writes the files that all processes share."""
        return self.index == 0

    def wait(self, what: str) -> None:
        """Until all processes are here.

        Args:
          what: the same word in each.
        """
        if self.count > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices(what)

    def from_first(self, value: Any) -> Any:
        """What the first process passes, in all of them.

        Args:
          value: a tree of arrays, of the same shapes and types in each.
        """
        if self.count == 1:
            return value
        from jax.experimental import multihost_utils

        return multihost_utils.broadcast_one_to_all(value)


def settings(environment: Mapping[str, str]) -> dict[str, Any]:
    """Arguments for `jax.distributed.initialize` from plain variables; none where JAX detects.

    Raises:
      UserError: only some of the variables are set, or one is no number.
    """
    if not environment.get("COORDINATOR_ADDRESS"):
        plain = [names[0] for names in _VARIABLES.values() if environment.get(names[0])]
        if plain:
            raise UserError(f"{plain[0]} is set without COORDINATOR_ADDRESS (HOST:PORT)")
        return {}
    found: dict[str, Any] = {}
    for argument, names in _VARIABLES.items():
        value = next((environment[name] for name in names if environment.get(name)), None)
        if value is None:
            raise UserError(
                f"COORDINATOR_ADDRESS is set without {names[0]}: set all of COORDINATOR_ADDRESS "
                f"(HOST:PORT), NUM_PROCESSES and PROCESS_ID"
            )
        found[argument] = value
    for argument in ("num_processes", "process_id"):
        name = _VARIABLES[argument][0]
        if not found[argument].isdecimal():
            raise UserError(f"{name} must be a whole number, got {found[argument]!r}")
        found[argument] = int(found[argument])
    if not found["process_id"] < found["num_processes"]:
        raise UserError(
            f"PROCESS_ID must be below NUM_PROCESSES ({found['num_processes']}), "
            f"got {found['process_id']}"
        )
    if not found["coordinator_address"].rpartition(":")[2].isdecimal():
        raise UserError(
            f"COORDINATOR_ADDRESS must be HOST:PORT, got {found['coordinator_address']!r}"
        )
    # Or JAX would take one device a process where it finds itself under SLURM.
    return {**found, "cluster_detection_method": "deactivate"}


@contextlib.contextmanager
def joined_processes() -> Iterator[Processes]:
    """Join the other processes for the length of the block, before JAX is used.

    A block that fails ends this process at once, with one line and an exit code that is not 0; the
    others then end too, within a minute. JAX itself ends a process that hears no more of the
    others, without asking anyone, so a small shell beside it has the last word.

    Raises:
      UserError: no cluster is found, or the others do not come.
    """
    given = settings(os.environ)
    try:
        jax.distributed.initialize(
            **given,
            initialization_timeout=_START_SECONDS,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_END_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"cannot join other processes ({str(error).splitlines()[0]}): start under SLURM or "
            "Open MPI, or set COORDINATOR_ADDRESS, NUM_PROCESSES and PROCESS_ID"
        ) from error
    here = Processes.here()
    name = f"process {here.index} of {here.count}"
    witness = _Witness(
        f"error: {name} ended in the middle of its work: it, or another, was killed or lost its "
        "connection. Give the command again, in all processes, to go on from the last checkpoint"
    )
    try:
        yield here
        # The last to arrive lets all go.
        jax.distributed.shutdown()
        witness.dismiss()
    except UserError as error:
        _leave(witness, f"error: {name}: {error}", 2)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
        _leave(witness, f"error: {name} was told to stop" if code > 128 else "", code)
    except KeyboardInterrupt:
        _leave(witness, f"error: {name} was interrupted", 130)
    except Exception as error:
        verbose = logger.isEnabledFor(logging.DEBUG)
        if _is_of_a_lost_process(error):
            if verbose:
                traceback.print_exc()
            # The witness says the rest.
            os._exit(3)
        try:
            # One line where the device's memory is full, as of a process alone.
            with exit_on_user_error(verbose=verbose):
                raise
        except SystemExit:
            _leave(witness, "", 1)
        except Exception:
            traceback.print_exc()
            _leave(witness, f"error: {name}: {error}", 1)


def _is_of_a_lost_process(error: Exception) -> bool:
    of_jax = type(error).__module__.partition(".")[0] in ("jax", "jaxlib")
    return of_jax and any(word in str(error) for word in _LOST)


def _leave(witness: _Witness, message: str, code: int) -> None:
    """End this process without the farewell that JAX would wait for."""
    witness.dismiss()
    if message:
        print(" ".join(message.split()), file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


class _Witness:
    """Says a line on stderr if this process ends without a word."""

    def __init__(self, message: str):
        # The shell waits for a line from us; the end of the pipe is our end. It stays when the
        # terminal interrupts us both.
        script = 'trap "" INT TERM; read -r word || printf "%s\\n" "$0" >&2'
        self._shell = subprocess.Popen(
            ["/bin/sh", "-c", script, message], stdin=subprocess.PIPE, start_new_session=True
        )

    def dismiss(self) -> None:
        with contextlib.suppress(OSError):
            self._shell.communicate(b"done\n", timeout=5)
