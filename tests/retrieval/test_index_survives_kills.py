"""SIGKILL at random moments of inserting and deleting, judged by what was acknowledged before.

CTCLIP_KILLS=20 python -m pytest tests/retrieval/test_index_survives_kills.py     # 20 of each
"""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from embedding_tables import random_table

pytest.importorskip("pymilvus", reason="ctclip[retrieval] is not installed")

from ctclip.embeddings import EmbeddingError, EmbeddingTable
from ctclip.retrieval.index import MilvusArchive

NUM_KILLS = int(os.environ.get("CTCLIP_KILLS", "10"))

ZYGOTE = """
import json, os, sys
from ctclip.embeddings import EmbeddingTable
from ctclip.retrieval.index import MilvusArchive

table = EmbeddingTable.load(sys.argv[2])
row_of = {volume: row for row, volume in enumerate(table.volume_id)}
requests = open(0, "rb", buffering=0)


def work():
    with MilvusArchive(sys.argv[1]) as archive:
        held = [row["volume_id"] for batch in archive._read("") for row in batch]
        print(json.dumps([os.getpid(), held]), flush=True)
        while True:
            action, names = json.loads(requests.readline())
            print("begun", flush=True)
            if action == "insert":
                archive.insert(table.select([row_of[name] for name in names]))
            else:
                archive.withdraw(names)
            print("done", flush=True)


while requests.readline():
    child = os.fork()
    if child == 0:
        work()
    os.waitpid(child, 0)
    print("dead", flush=True)
"""


class Victims:
    """Processes that hold the archive one after the other and are killed."""

    def __init__(self, uri, table_path):
        self._zygote = subprocess.Popen(
            [sys.executable, "-c", ZYGOTE, str(uri), str(table_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self):
        self._send("start")
        self._pid, held = json.loads(self._zygote.stdout.readline())
        return held

    def tell(self, action, names):
        """Have it begin; returns when it has."""
        self._send(json.dumps([action, names]))
        assert self._zygote.stdout.readline() == "begun\n"

    def acknowledged(self):
        return self._zygote.stdout.readline() == "done\n"

    def kill(self):
        """Kill the process; whether it acknowledged something just before it died."""
        os.kill(self._pid, signal.SIGKILL)
        lines = iter(self._zygote.stdout.readline, "dead\n")
        return "done\n" in list(lines)

    def close(self):
        self._zygote.stdin.close()
        self._zygote.wait()
        self._zygote.stdout.close()

    def _send(self, line):
        self._zygote.stdin.write(line + "\n")
        self._zygote.stdin.flush()


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("action", ["insert", "withdraw"])
def test_killed_at_any_moment_the_index_keeps_what_it_acknowledged(tmp_path, action):
    table = random_table(900, width=32, volumes_per_patient=3)
    table.save(tmp_path / "table.parquet")
    uri = tmp_path / "archive.db"
    MilvusArchive.build(uri, table.select(range(300))).close()
    volumes_of = {p: [f"{p}_a_{n}" for n in (1, 2, 3)] for p in dict.fromkeys(table.patient_id)}
    held = {volume for patient in list(volumes_of)[:100] for volume in volumes_of[patient]}
    deleted: set[str] = set()
    fresh = list(volumes_of)[100:]
    rng = random.Random(0)
    in_flight: set[str] = set()
    lasted = 0.1
    other = "withdraw" if action == "insert" else "insert"
    unacknowledged = 0

    victims = Victims(uri, tmp_path / "table.parquet")
    for kill in range(NUM_KILLS):
        found = victims.start()
        assert len(found) == len(set(found)), "a row came twice"
        assert held - in_flight <= set(found), "an acknowledged row was lost"
        assert set(found) <= held | in_flight
        assert not deleted & set(found)
        deleted |= held - set(found)  # what a withdrawal did before it was killed
        held = set(found)
        if kill == 0:
            with pytest.raises(EmbeddingError, match="another process"):
                MilvusArchive(uri)
        for what, dies in [(other, False), *[(action, False)] * (kill == 0), (action, True)]:
            deleting = what == "withdraw"
            patients = sorted({volume.split("_")[0] for volume in held})[:1]
            if not deleting:
                patients, fresh = fresh[:3], fresh[3:]
            in_flight = {volume for patient in patients for volume in volumes_of[patient]}
            victims.tell(what, patients if deleting else sorted(in_flight))
            start = time.perf_counter()
            if dies:
                time.sleep((kill + rng.random()) / NUM_KILLS * lasted)
                acknowledged = victims.kill()
                unacknowledged += not acknowledged
                lasted *= 0.8 if acknowledged else 1.1  # as it does now, whatever else is running
            else:
                acknowledged = victims.acknowledged()
                if what == action:
                    lasted = time.perf_counter() - start
            if acknowledged:
                held = held - in_flight if deleting else held | in_flight
                deleted |= in_flight if deleting else set()
                in_flight = set()
    victims.close()

    print(f"{unacknowledged} of {NUM_KILLS} kills came before the acknowledgement")
    assert unacknowledged
    with MilvusArchive(uri) as archive:
        gone = [table.vectors[table.row_of(volume)].tobytes() for volume in deleted]
        archive.backup(tmp_path / "backup.parquet")
    left = b"".join(path.read_bytes() for path in uri.rglob("*") if path.is_file())
    assert deleted
    assert not [vector for vector in gone if vector in left]
    backup = EmbeddingTable.load(tmp_path / "backup.parquet")
    assert len(set(backup.volume_id)) == len(backup)
    expected = table.select([table.row_of(volume) for volume in backup.volume_id])
    np.testing.assert_array_equal(backup.vectors, expected.vectors)
