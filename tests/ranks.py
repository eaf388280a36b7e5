"""Runs a function on several gloo ranks, under a timeout that kills and reports instead of hanging."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

#: Ranks are forked from a server that has imported what takes long.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "transformers", "torch.distributed.fsdp", "zoo", "moepatch"])


class RankError(AssertionError):
    """A rank failed or hung; the message holds every rank's traceback."""


#: Seconds without any work of a process that has work to do: a busy machine gives it some sooner.
_IDLE = 8
#: Seconds until nobody waits any longer. Only against hangs.
_LONGEST = 1200


def apart(function, *args):
    """What a function returns in a process of its own, which has imported what takes long, and has no process group yet."""
    return on_ranks(1, function, *args, grouped=False)[0]


def on_ranks(world: int, function, *args, stuck_after: str | None = None, grouped: bool = True) -> list:
    """Calls ``function(*args)`` on every rank of a gloo group and returns what each returned.

    Args:
        stuck_after: for functions that are expected to hang: once all ranks have printed this, they are taken to hang when the main thread of
            none has used the processor for a while, however slow the machine is.
        grouped: False: without the group.

    Raises:
        RankError: a rank raised, died, or hung; then all are killed, with their stacks in the message.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = [_context.Process(target=_rank, args=(rank, world, folder, function, args, grouped), daemon=True) for rank in range(world)]
        for process in processes:
            process.start()
        _wait(processes, lambda: stuck_after is not None and all(stuck_after in _log(folder, rank) for rank in range(world)))
        hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGABRT)  # faulthandler writes its stack into its log
                process.join(60)
            if process.is_alive():
                process.kill()
                process.join(60)
        logs = [_log(folder, rank) for rank in range(world)]
        failed = [rank for rank, process in enumerate(processes) if process.exitcode != 0]
        if hung or failed:
            report = "\n".join(f"--- rank {rank} ({'hung' if rank in hung else processes[rank].exitcode})\n{log[-6000:]}" for rank, log in enumerate(logs))
            raise RankError(f"ranks {hung} hung, ranks {failed} failed:\n{report}")
        import torch

        return [torch.load(Path(folder, f"result-{rank}"), weights_only=False) for rank in range(world)]


def _wait(processes: list, ready) -> None:
    """Until all have ended, or are stuck after they were ready, or for far longer than anything takes."""
    end, used, since = time.monotonic() + _LONGEST, None, time.monotonic()
    while any(process.is_alive() for process in processes) and time.monotonic() < end:
        if any(process.exitcode not in (None, 0) for process in processes):
            end = min(end, time.monotonic() + _LONGEST / 4)  # others notice that, or hang
        for process in processes:
            process.join(0.1)
        now = [_ticks(process.pid) for process in processes] if ready() else None
        if now != used or now is None:
            used, since = now, time.monotonic()
        elif time.monotonic() - since > _IDLE:
            return


def _ticks(pid: int) -> int:
    """The processor time that a process's main thread has used so far; gloo's own threads look around for ever."""
    try:
        fields = Path(f"/proc/{pid}/task/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has ended
        return -1
    return int(fields[11]) + int(fields[12])


def _log(folder: str, rank: int) -> str:
    path = Path(folder, f"log-{rank}")
    return path.read_text() if path.exists() else ""


def _rank(rank: int, world: int, folder: str, function, args, grouped: bool) -> None:
    log = open(Path(folder, f"log-{rank}"), "w", buffering=1)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = log
    faulthandler.enable(log)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"] = str(rank), str(world), str(rank)
    try:
        if grouped:
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
        torch.save(function(*args), Path(folder, f"result-{rank}"))
        if grouped:
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        log.flush()
        os._exit(1)
