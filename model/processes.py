"""Several processes of one command, as torchrun starts them: what connects them, which of them speaks, how they end.

Process 0 alone prints. If any of them fails, one prints one line, and all end: the others notice it by a broken
connection or by the SIGTERM of torchrun, and are silent if the reason has been told.
"""

import hashlib
import io
import os
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.rendezvous import rendezvous

from .config import InputError
from .console import explain, fail, one_line

TIMEOUT = timedelta(seconds=120)  # that a process waits for the others
LEAVE = 30  # seconds that process 0 waits for the others at the end
SILENT = 30  # seconds without a beat after which a process counts as lost; most end with a broken connection before
BEAT = 1.0  # seconds between two beats
FINISHED = -(10**12)  # makes the number of beats negative
BLOCKS, BLOCK = 64, 2**16  # of a large file that are compared, evenly spread; bytes of each
WAIT = 0.4  # seconds that a process waits for another one to tell why all end
LOST = "Connection closed", "Connection reset", "Broken pipe", "DistNetworkError", "DistStoreError"  # of gloo
LOST += ("remote process exited",)  # of NCCL


def together(command):
    """Run command(team), in this process of several -> exit code. A process that fails does not return."""
    first, known = os.environ.get("RANK") in (None, "", "0"), []
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # also in the threads that start later
    threading.Thread(target=wait_for_sigterm, args=(known,), daemon=True).start()
    try:
        team = Team(*in_thread(connect))
        known.append(team)
    except (InputError, RuntimeError) as broken:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # of a caller that goes on, and of its children
        return fail(*explain(broken)) if first or isinstance(broken, dist.DistNetworkError) else 2
    except KeyboardInterrupt:
        if first:
            fail("interrupted; nothing was written", 130)
        os._exit(130)  # the thread that connects would abort Python's end
    streams, sys.stderr = (sys.stdout, sys.stderr), team.voice
    if team.rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open until the process ends)
    try:
        code = command(team) or team.finish()
    except SystemExit as left:  # of argparse
        code = left.code
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # of stdout, as in `... | head`
        code = 1
    except Exception:  # with --debug
        code = 1
        traceback.print_exc(file=streams[1])
    if code:
        with_patience(team, code)
        with suppress(BrokenPipeError):
            sys.stdout.flush()
        os._exit(code)  # connections that are still open must not keep it
    sys.stdout, sys.stderr = streams
    return 0


def in_thread(work):
    """work(), which waits in C++ for others; in a thread, so that Ctrl-C ends the wait."""
    done = []

    def run():
        try:
            done.append((work(), None))
        except Exception as broken:
            done.append((None, broken))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    result, broken = done[0]
    if broken is not None:
        raise broken
    return result


def wait_for_sigterm(known):
    """In a thread, because the main one may wait for a device. known: a list of the Team, as soon as there is one."""
    signal.sigwait({signal.SIGTERM})
    for team in known:
        team.tell(f"error: {STOPPED}\n", WAIT * team.rank)
    if not known and os.environ.get("RANK") == "0":
        fail(STOPPED, 1)
    os._exit(128 + signal.SIGTERM)


def with_patience(team, code):
    """Tell why this process ends, if no other has."""
    line = team.voice.error
    if code == 130:  # the others wait for this one in collectives, where process 0 does not notice Ctrl-C
        team.tell("" if team.rank else line, 5 * WAIT * (team.rank > 0))
    elif any(word in line for word in LOST):
        team.tell(f"error: {ENDED}\n", WAIT * (1 + team.rank))
    else:
        team.tell(line, 2 * WAIT * (team.rank > 0))  # process 0 mostly fails in the same way


ENDED = "another process ended, so all end; torchrun reports which"
STOPPED = "stopped by SIGTERM, which torchrun sends if another process ended; torchrun reports which"


def connect():
    """The store that all processes see, this one's rank and their number, from what torchrun sets. InputError."""
    given = {name: os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")}
    wrong = [n for n, value in given.items() if not (value if n == "MASTER_ADDR" else value.isdecimal())]
    if not wrong and int(given["RANK"]) >= int(given["WORLD_SIZE"]):
        wrong = ["RANK"]
    if wrong:
        name = wrong[0]
        raise InputError(
            f"WORLD_SIZE is {given['WORLD_SIZE'][:20]}, but {name} is {given[name][:20] or 'not set'}; start the "
            "processes with torchrun --nproc-per-node N run.py ..., or unset WORLD_SIZE"
        )
    try:
        socket.getaddrinfo(given["MASTER_ADDR"], None)
    except OSError as broken:
        raise InputError(f"MASTER_ADDR {given['MASTER_ADDR'][:99]} has no address ({broken}); correct it") from broken
    try:
        return next(rendezvous("env://", timeout=TIMEOUT))
    except dist.DistStoreError as broken:
        raise InputError(
            f"not all {given['WORLD_SIZE']} processes came within {TIMEOUT.seconds} s; start all of them, with the "
            "same MASTER_ADDR and MASTER_PORT"
        ) from broken
    except dist.DistNetworkError as broken:
        if "EADDRINUSE" not in str(broken):
            raise
        raise InputError(f"MASTER_PORT {given['MASTER_PORT']} is used by another program; give another") from broken


class Voice(io.TextIOBase):
    """stderr of one of several processes. The line that begins with "error:" is kept; the rest is only of process 0."""

    def __init__(self, stream, rank):
        super().__init__()
        self.stream, self.rank, self.error = stream, rank, ""

    def write(self, text):
        if text.startswith("error: "):
            self.error = text.rstrip("\n") + "\n"
        elif self.rank == 0 and not self.error:
            self.stream.write(text)
        return len(text)

    def flush(self):
        self.stream.flush()


class Team:
    """All processes of the command.

    rank, size   number of this process, from 0; how many there are
    store        a TCPStore that all see
    mesh         after `divide`: DeviceMesh ("dp", "tp"); the processes of a row share one model
    """

    def __init__(self, store, rank, size):
        self.store, self.rank, self.size, self.mesh = dist.PrefixStore("plphp", store), rank, size, None
        self.voice, self.lock, self.told = Voice(sys.stderr, rank), threading.Lock(), False
        self.over = threading.Event()
        # connections of their own, because a wait in one of them keeps other threads waiting
        self.listening, self.joining = (dist.PrefixStore("plphp", store.clone()) for _ in range(2))
        self.watch = threading.Thread(target=self._listen, daemon=True)
        self.watch.start()

    def join(self, flags):
        """Connect the processes for collectives. InputError, in all, unless all have the same flags, {name: value}."""
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        given = {"store": self.joining, "rank": self.rank, "world_size": self.size, "timeout": TIMEOUT}
        try:
            in_thread(partial(dist.init_process_group, backend, **given))
        except RuntimeError as broken:
            why = one_line(broken).rpartition("] ")[2][:200]  # without the places in torch's code
            raise InputError(
                f"gloo could not connect the processes ({why}); if they are on several machines, set "
                "GLOO_SOCKET_IFNAME on each to the name of its network interface to the others"
            ) from broken
        every = [None] * self.size
        dist.all_gather_object(every, flags)
        for rank, theirs in enumerate(every):
            for name, ours in every[0].items():
                if theirs[name] != ours:
                    raise InputError(
                        f"--{name.replace('_', '-')} is {theirs[name]} in process {rank} and {ours} in process 0; give "
                        "all processes the same"
                    )

    def _listen(self):
        """Waits until a process has told why all end, and ends this one if its main thread still waits for others."""
        heard, due = {}, 0.0  # {rank: (number of its beats, looks since it changed)}
        try:
            while not self.listening.check(["told"]):
                if self.over.wait(0.1):
                    return
                if time.monotonic() > due:
                    due = time.monotonic() + BEAT
                    self.listening.add(f"beats {self.rank}", 1)
                    if self.rank == 0 and (lost := self._lost(heard)) is not None:
                        self.tell(f"error: process {lost} is lost, so all end; start all of them again\n", 0)
            self.told = True
        except RuntimeError:  # the store was in process 0, which has ended
            self.tell(f"error: {ENDED}\n", 0)
        time.sleep(3 * WAIT)
        os._exit(1)

    def _lost(self, heard):
        """The number of a process without a new beat for SILENT seconds, or None. Updates `heard`, see `_listen`.

        Replicas exchange nothing while they answer, so that no connection breaks if one is killed. Looks are counted,
        one a beat: after a pause of this process itself, the others need time for their next beat.
        """
        for rank in range(self.size):
            beats = self.listening.add(f"beats {rank}", 0)
            before, looks = heard.get(rank, (None, 0))
            heard[rank] = beats, looks + 1 if beats == before else 0
            if beats > 0 and heard[rank][1] * BEAT > SILENT:
                return rank
        return None

    def tell(self, line, patience):
        """Print the line, unless another process tells within so many seconds why all end."""
        with self.lock:
            end = time.monotonic() + patience
            try:
                while not self.store.add("asked", 0) and time.monotonic() < end:
                    time.sleep(0.02)
                mine = self.store.add("asked", 1) == 1
            except RuntimeError:
                mine = self.rank == 1
            if mine and not self.told:
                self.voice.stream.write(line)
                self.voice.stream.flush()
            self.told, self.voice.error = True, self.voice.error or line  # the last that it prints
            with suppress(RuntimeError):
                self.store.set("told", "")
        if self.rank == 0:
            time.sleep(WAIT)  # its end may close the store; until then the others hear that it has told

    def finish(self):
        """End without an error -> exit code, not 0 if another process is lost. Process 0, which may hold the store, is
        the last."""
        self.over.set()
        self.watch.join()  # it must not use the store while Python ends
        end = time.monotonic() + LEAVE
        try:
            self.store.add(f"beats {self.rank}", FINISHED)
            self.store.add("done", 1)
            while self.rank == 0 and self.store.add("done", 0) < self.size:
                if self.store.check(["told"]):
                    return 1
                if time.monotonic() > end:
                    return fail(ENDED, 1)
                time.sleep(0.01)
        except RuntimeError:  # the store was in process 0, which has ended
            return fail(ENDED, 1)
        if dist.is_initialized():  # not with --version
            dist.destroy_process_group()
        return 0

    def device(self, name):
        """The device of this process, if --device is `name`. InputError for the number of a CUDA device."""
        if name.startswith("cuda:"):
            raise InputError(f"--device {name} is one device for {self.size} processes; use cuda, one for each of them")
        if name == "cpu" or not torch.cuda.is_available():
            return name
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", self.rank)))
        return f"cuda:{torch.cuda.current_device()}"

    def divide(self, tp, device_type):
        """Form groups of tp processes that share one model. InputError if the processes cannot be divided so."""
        self.same("the type of device", [device_type.encode()])  # they could not form groups
        if self.size % tp:
            raise InputError(f"--tp {tp} does not divide {self.size} processes; use a divisor of {self.size}")
        self.mesh = init_device_mesh(device_type, (self.size // tp, tp), mesh_dim_names=("dp", "tp"))

    def same(self, what, chunks):
        """InputError, in all processes, unless all have the same chunks of bytes."""
        mine, digests = hashlib.sha256(), [b""] * self.size
        for chunk in chunks:
            mine.update(chunk)
        dist.all_gather_object(digests, mine.digest())
        other = next((rank for rank, found in enumerate(digests) if found != digests[0]), None)
        if other is not None:
            raise InputError(f"{what} of process {other} differs from that of process 0; give both the same")


def contents(folder):
    """Yields name, size and first million bytes of each file in a checkpoint's folder, with all headers, and samples of
    the rest: not every difference of a few bytes is noticed."""
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        with open(path, "rb") as file:
            size = path.stat().st_size
            yield f"{path.name} {size} ".encode() + file.read(10**6)
            for i in range(BLOCKS if size > 10**6 else 0):
                file.seek((size - BLOCK) * i // (BLOCKS - 1))
                yield file.read(BLOCK)
