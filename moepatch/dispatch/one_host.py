"""What ranks of one host share: numbers from host to host, and memory that their GPUs read."""

from __future__ import annotations

import mmap
import os
import tempfile
import time

import torch
import torch.distributed as dist

from ..errors import BackendUnavailable
from ..kernels.symm_mem import Peers
from .chain import ALONE, Chain, Turn

#: A word of `HostNumbers`: 31 bits of value, 10 of how long it stays, the rest for the number of the round.
_VALUE, _NUMBER = 31, 41
_FOLLOW, _ROUNDS = (1 << _NUMBER - _VALUE) - 1, 1 << 63 - _NUMBER


class CudaMemory:
    """A buffer on this GPU that all ranks of a group can read. Making one is a collective."""

    def __init__(self, group: dist.ProcessGroup, size: int, device: torch.device, hosts: HostNumbers):
        import torch.distributed._symmetric_memory as symm_mem
        from torch._C._distributed_c10d import _SymmetricMemory

        problem = None
        try:
            # What symm_mem.empty does too, but that keeps what is freed in a pool: buffers that have grown would pile up there.
            self.buffer = _SymmetricMemory.empty_strided_p2p((size,), (1,), torch.uint8, device)
        except RuntimeError as error:  # above all out of memory
            problem = error
        # The rendezvous would wait for a rank that never comes.
        failed = [rank for rank, bad in enumerate(hosts.exchange(int(problem is not None))) if bad]
        if failed:
            raise BackendUnavailable(f"symm_mem: ranks {failed} could not allocate {size / 2**20:.0f} MiB of symmetric memory") from problem
        self.handle = symm_mem.rendezvous(self.buffer, group)
        buffers = [self.handle.get_buffer(rank, (size,), torch.uint8) for rank in range(group.size())]
        address_W = torch.tensor([b.data_ptr() for b in buffers], dtype=torch.int64, device=device)
        self.peers = Peers(buffers, address_W, group.rank())
        self._try()

    def barrier(self) -> None:
        """All ranks' streams meet here; nothing waits on the host."""
        self.handle.barrier(channel=0)

    def _try(self) -> None:
        """Writes into the own buffer and reads the others', once."""
        self.buffer[:1].fill_(self.peers.rank)
        self.barrier()
        seen = torch.cat([b[:1] for b in self.peers.buffers]).tolist()
        self.barrier()
        if seen != list(range(len(seen))):
            raise BackendUnavailable(f"symm_mem: rank {self.peers.rank} cannot read others' memory: {seen}. Use dispatch='all_to_all'.")


class HostNumbers:
    """A number from each rank's host to all others' through shared memory: about a microsecond where all have come as far.

    A word holds the number of the round, for how many calls after it the rank's number stays, and the number, so that it is valid as soon as it is
    seen. Calls for which all ranks have said that their numbers stay need no round: hosts run ahead of each other there. Words of a round stay until
    all ranks have come to the next one, whose words lie elsewhere.
    """

    def __init__(self, group: dist.ProcessGroup, patience: float = 600):
        self.rank, self.world, self.patience = group.rank(), group.size(), patience
        self.calls = self.rounds = self.until = 0
        self.known: tuple[int, ...] = ()
        self.chain: Chain | None = None
        path, size = "", 2 * 8 * self.world
        if self.rank == 0:
            file, path = tempfile.mkstemp(prefix="moepatch-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
            os.truncate(file, size)
            os.close(file)
        told: list = [None] * self.world
        dist.all_gather_object(told, (path, os.uname().nodename), group=group)
        problem = None
        try:
            with open(told[0][0], "r+b") as shared:
                self.words = memoryview(mmap.mmap(shared.fileno(), size)).cast("q")
        except OSError as error:
            problem = f"rank {self.rank} on {told[self.rank][1]} shares no memory with rank 0 on {told[0][1]} ({error.strerror})"
        problems: list = [None] * self.world
        dist.all_gather_object(problems, problem, group=group)
        if self.rank == 0:
            os.unlink(path)
        if any(problems):
            raise BackendUnavailable(
                f"symm_mem needs all ranks of `ep` on one host: {next(filter(None, problems))}. "
                "Use dispatch='all_to_all', or a mesh with a smaller `ep`."
            )

    def exchange(self, value: int, turn: Turn = ALONE) -> tuple[int, ...]:
        """What every rank passed to this call, by rank.

        Args:
            value: 0 or more and below 2^31.
            turn: the same on all ranks but for `Turn.follow`, the least of which counts.

        Raises:
            ValueError: another number was announced for this call.
            TimeoutError: a rank has not come here.
        """
        self.calls += 1
        if not turn.begins and turn.chain is self.chain and self.calls <= self.until:
            if value != self.known[self.rank]:
                raise ValueError(
                    f"symm_mem: {value} tokens in a layer where {self.known[self.rank]} were announced: "
                    "layers of one list had as many each in the pass before. "
                    "Use dispatch='all_to_all' for a model whose layers differ in this."
                )
            return self.known
        self.rounds, self.chain = self.rounds + 1, turn.chain
        number, first = self.rounds % _ROUNDS, self.rounds % 2 * self.world
        self.words[first + self.rank] = number << _NUMBER | min(turn.follow, _FOLLOW) << _VALUE | value
        words = [self._word(first + rank, rank, number) for rank in range(self.world)]
        self.known = tuple(word & (1 << _VALUE) - 1 for word in words)
        self.until = self.calls + min(word >> _VALUE & _FOLLOW for word in words)
        return self.known

    def _word(self, at: int, rank: int, number: int) -> int:
        """Waits for a rank's word of a round."""
        end, looks = None, 0
        while (word := self.words[at]) >> _NUMBER != number:
            looks += 1
            if looks > 100:
                os.sched_yield()
                end = end or time.monotonic() + self.patience
                if time.monotonic() > end:
                    raise TimeoutError(f"symm_mem: rank {rank} has not come to dispatch {self.calls} for {self.patience:.0f} s")
            if looks > 20_000:
                time.sleep(1e-4)
        return word
