"""Raw AMQP clients, each a program of its own that is told what to do: how they are run, and how they name what they attach to."""

import json
import os
import subprocess
import sys
import threading

from . import node
from .process import REPOSITORY

AMQP_PORT = 5671
RUN_SECS = 120
PYTHON = REPOSITORY / "tests" / "python"
# The one that Debian's packages of Python modules are for.
DEBIAN_PYTHON = "/usr/bin/python3"
CLIENTS = {
    "rhea": ["node", node.SOURCE / "raw.js"],
    "proton": [DEBIAN_PYTHON, PYTHON / "proton_client.py"],
    "uamqp": [sys.executable, PYTHON / "uamqp_client.py"],
}


def node_of(identity):
    """An identity as the client's arguments name it: its token, and its addresses."""
    module = f"/modules/{identity.module}" if identity.module else ""
    base, hub = f"/devices/{identity.device}{module}", identity.host.partition(".")[0]
    return {
        "name": identity.client_id, "token": identity.token(), "audience": f"{identity.host}{base}",
        "user": f"{identity.device}{module}@sas.{hub}",
        "events": f"{base}/messages/events", "inputs": f"{base}/messages/events",
    }  # fmt: skip


def run(site, verb, deadline_secs=RUN_SECS, client="rhea", when=(), **arguments):
    """Runs a verb to its end; all that it told, as one dictionary. `when` are calls by what it tells."""
    arguments |= {"verb": verb, "host": site.address, "port": AMQP_PORT, "ca": str(site.authority.root)}
    environment = {"PATH": os.environ["PATH"]}
    if client == "rhea":
        environment["NODE_PATH"] = str(node.modules())
    told, calls = {}, dict(when)
    with subprocess.Popen(
        [*map(str, CLIENTS[client])], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment, text=True,
    ) as child:  # fmt: skip
        errors = []
        reader = threading.Thread(target=lambda: errors.append(child.stderr.read()))
        reader.start()
        late = threading.Timer(deadline_secs, child.kill)
        late.start()
        try:
            child.stdin.write(json.dumps(arguments))
            child.stdin.close()
            for line in child.stdout:
                told |= json.loads(line)
                for name in told.keys() & calls.keys():
                    calls.pop(name)()
            code = child.wait()
        finally:
            late.cancel()
            child.kill()
            reader.join()
    assert code == 0, f"{client} {verb} ended with {code} of at most {deadline_secs} s: {told}\n{errors[0][-3000:]}"
    return told
