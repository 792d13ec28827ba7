"""A raw AMQP client, rhea, and how it names what it attaches to."""

import json
import os
import subprocess

from . import node

AMQP_PORT = 5671


def node_of(identity):
    """An identity as the client's arguments name it: its token, and its addresses."""
    module = f"/modules/{identity.module}" if identity.module else ""
    base = f"/devices/{identity.device}{module}"
    return {
        "name": identity.client_id, "token": identity.token(), "audience": f"{identity.host}{base}",
        "events": f"{base}/messages/events", "inputs": f"{base}/messages/events",
    }  # fmt: skip


def run(site, verb, deadline_secs=node.RUN_SECS, **arguments):
    """Runs a verb to its end; all that it told, as one dictionary."""
    arguments |= {"verb": verb, "host": site.address, "port": AMQP_PORT, "ca": str(site.authority.root)}
    done = subprocess.run(
        ["node", str(node.SOURCE / "raw.js")], input=json.dumps(arguments), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={"PATH": os.environ["PATH"], "NODE_PATH": str(node.modules())}, text=True,
        timeout=deadline_secs, check=False,
    )  # fmt: skip
    told = {}
    for line in done.stdout.splitlines():
        told |= json.loads(line)
    assert done.returncode == 0, f"{told}\n{done.stderr[-2000:]}"
    return told
