"""Replicas of a model that answer one file of questions together. Process 0 alone reads and writes the answers.

A replica is one process, or several that share a model (`model.parallel`); the first of them takes questions and sends
answers. All goes through the store of the processes: a counter of the questions taken, so that whoever has room takes
the next one, and a message for each answer. A kill can lose answers that process 0 has not written; the next run, of
any number of processes, computes them again.
"""

import hashlib
import itertools
import json
import time

import torch
import torch.distributed as dist

from .config import InputError

POLL = 0.05  # seconds between two looks into the store
ALIKE = 30  # seconds that a process waits for the others of its replica to fail like it


class Replicas:
    """What this process does for the file. team: a divided `model.processes.Team`; tp: processes of a replica."""

    def __init__(self, team, tp):
        self.store, self.count, self.shared = team.store, team.size // tp, tp > 1
        self.group, self.device = (team.mesh["tp"].get_group() if self.shared else None), team.mesh.device_type
        self.first = team.rank % tp == 0  # of its replica
        self.received, self._looked = 0, 0.0
        self.said = f"{self.count} replica{'s' * (self.count > 1)}" + (f" of {tp} processes" if self.shared else "")

    def offer(self, numbers):
        """Process 0: the questions to be answered, by their numbers in the file."""
        self.store.set("offer", json.dumps(numbers))

    def offered(self):
        """The other processes: those numbers, as soon as process 0 has read the file of answers."""
        while not self.store.check(["offer"]):
            time.sleep(POLL)  # Ctrl-C would not end a wait inside the store
        return json.loads(self.store.get("offer"))

    def take(self, numbers):
        """Yields those of the numbers that this replica answers. Each is taken only when it is asked for."""
        while True:
            place = self.store.add("taken", 1) - 1 if self.first else 0
            if self.shared:  # all processes of the replica are at the same place of their programs here
                shared = torch.tensor(place, device=self.device)
                dist.broadcast(shared, group=self.group, group_src=0)
                place = shared.item()
            if place >= len(numbers):
                return
            yield numbers[place]

    def agreed(self, ask, question):
        """ask(question), or an InputError in all the replica's processes if one fails or has another prompt or picture.

        Without it, they would divide the work on different questions and produce wrong answers.
        """
        if not self.shared:
            return ask(question)
        try:
            generation = ask(question)
            said = hashlib.sha256(str(generation.ids).encode())
            for square in itertools.chain(*(picture.squares for picture in generation.pictures)):
                said.update(square.tobytes())
            said = said.hexdigest()
        except InputError as wrong:
            generation, said = None, str(wrong)
        heard = [None] * self.group.size()
        dist.all_gather_object(heard, said, group=self.group)
        if len(set(heard)) > 1:
            raise InputError("the processes read different pictures or files; give all of them the same")
        if generation is None:
            raise InputError(said)
        return generation

    def fail_alike(self, number, wrong):
        """Wait until all the replica's processes have failed at question `number`. InputError, which ends all, if one
        goes on: it would wait for this one."""
        if not self.shared:
            return
        end, failed = time.monotonic() + ALIKE, f"failed {number}"
        self.store.add(failed, 1)
        while self.store.add(failed, 0) < self.group.size():
            if time.monotonic() > end:
                raise InputError(f"process {dist.get_rank()} failed where another went on: {wrong}")
            time.sleep(POLL)

    def send(self, *message):
        """To process 0. Of several processes with the same answer only the first sends it."""
        if self.first:
            self.store.set(f"message {self.store.add('messages', 1)}", json.dumps(message))

    def receive(self):
        """Process 0: yields the messages that have arrived since. Looks at most every POLL seconds."""
        if time.monotonic() < self._looked + POLL:
            return
        while self.store.check([key := f"message {self.received + 1}"]):
            message = json.loads(self.store.get(key))
            self.store.delete_key(key)
            self.received += 1
            yield message
        self._looked = time.monotonic()
