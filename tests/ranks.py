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


def on_ranks(world: int, function, *args, timeout: float = 100) -> list:
    """Calls ``function(*args)`` on every rank of a gloo group and returns what each returned.

    Raises:
        RankError: a rank raised, died, or was still running after `timeout` seconds; then all are killed, with their stacks in the message.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = [_context.Process(target=_rank, args=(rank, world, folder, function, args), daemon=True) for rank in range(world)]
        for process in processes:
            process.start()
        end = time.monotonic() + timeout
        for process in processes:
            process.join(max(0.1, end - time.monotonic()))
        hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGABRT)  # faulthandler writes its stack into its log
                process.join(5)
            if process.is_alive():
                process.kill()
                process.join(10)
        logs = [Path(folder, f"log-{rank}").read_text() if Path(folder, f"log-{rank}").exists() else "" for rank in range(world)]
        failed = [rank for rank, process in enumerate(processes) if process.exitcode != 0]
        if hung or failed:
            report = "\n".join(f"--- rank {rank} ({'hung' if rank in hung else processes[rank].exitcode})\n{log[-6000:]}" for rank, log in enumerate(logs))
            raise RankError(f"ranks {hung} hung, ranks {failed} failed:\n{report}")
        import torch

        return [torch.load(Path(folder, f"result-{rank}"), weights_only=False) for rank in range(world)]


def _rank(rank: int, world: int, folder: str, function, args) -> None:
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
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
        torch.save(function(*args), Path(folder, f"result-{rank}"))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        log.flush()
        os._exit(1)
