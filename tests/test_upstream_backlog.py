"""A long outage: a big backlog goes up whole and in order, with the memory of a small one.

`EDGEHUB_TEST_BACKLOG` messages wait (100,000; a million in the long form). Rates and memory are printed at the end.
"""

import os
import re
import time
from pathlib import Path

from blackbox import healing, wait
from blackbox.traffic import Traffic

BACKLOG = int(os.environ.get("EDGEHUB_TEST_BACKLOG", "100000"))
# Before, and while the backlog goes up.
FEW = 100
# What the hub may take for a backlog beyond what it takes without one: its caches and rings fill, nothing else grows.
MEMORY_BYTES_MAX = 256 << 20
SETTINGS = {"CloudOperationTimeoutSecs": 10, "RuntimeLogLevel": "info"}


def memory_bytes(pid):
    """Resident memory of a process, now."""
    return int(re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1]) << 10


def test_a_big_backlog(make_site):
    site = make_site(settings=SETTINGS)
    pid = site.hub.pid
    traffic = Traffic(site, [*site.leaves, site.modules["sender"]])
    traffic.publish(FEW)
    traffic.settle()
    site.cut_upstream()
    before = memory_bytes(pid)
    began = time.monotonic()
    traffic.publish(BACKLOG // len(traffic.senders))
    taken = time.monotonic() - began
    site.assert_balanced()
    waiting, full = site.queued(), memory_bytes(pid)
    assert waiting >= BACKLOG - len(traffic.senders)
    most = 0

    def settled(limit):
        nonlocal most
        most = max(most, memory_bytes(pid))
        return site.queued() <= limit

    site.restore_upstream()
    healed = time.monotonic()
    wait.until("the first is settled", lambda: settled(waiting - 1), 120)
    first = time.monotonic() - healed
    # New messages go on while the old ones go up.
    traffic.publish(FEW)
    wait.until("half of it is settled", lambda: settled(waiting // 2), 60 + waiting / 200)
    wait.until("all is settled", lambda: settled(0), 60 + waiting / 200)
    drained = time.monotonic() - healed
    traffic.settle()
    traffic.close()
    assert site.hub.running() and site.hub.pid == pid
    grown = max(full, most) - before
    healing.note(f"backlog of {waiting:,}", "backing_off", first, drained, waiting)
    healing.say(
        f"backlog: {waiting:,} messages of {len(traffic.senders)} senders; taken at {waiting / taken:,.0f}/s, gone up at "
        f"{waiting / drained:,.0f}/s; memory {before >> 20} MiB before, {full >> 20} MiB with it, at most {most >> 20} MiB "
        "while it went up"
    )
    assert grown < MEMORY_BYTES_MAX, f"{grown >> 20} MiB for {waiting} messages"
