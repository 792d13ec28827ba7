"""A raw AMQP client (Qpid Proton): one JSON object with its arguments on the standard input, the verb among them.

What it tells are JSON lines on the standard output; it ends by itself. Verbs and arguments are those of `tests/node/raw.js`.
"""

import collections
import json
import sys

from proton import Condition, ConnectionException, Delivery, Endpoint, Message, SSLDomain
from proton.utils import BlockingConnection, LinkDetached

STEP_SECS = 60
ENDS = {
    Delivery.ACCEPTED: "accepted", Delivery.REJECTED: "rejected", Delivery.RELEASED: "released",
    Delivery.MODIFIED: "modified",
}  # fmt: skip
ARGS = json.load(sys.stdin)


def tell(**what):
    print(json.dumps(what), flush=True)


class Client:
    """One connection. Events are handled while it waits, and only then."""

    def __init__(self, **options):
        domain = SSLDomain(SSLDomain.MODE_CLIENT)
        domain.set_trusted_ca_db(ARGS["ca"])
        # The library compares names only; the certificate has one beside its address.
        domain.set_peer_authentication(SSLDomain.VERIFY_PEER_NAME)
        if ARGS.get("sasl"):
            options["allowed_mechs"] = ARGS["sasl"]
        else:
            options["sasl_enabled"] = False
        if ARGS.get("sasl") == "PLAIN":
            options |= {"user": ARGS["identity"]["user"], "password": ARGS["identity"]["token"]}
        self._blocking = BlockingConnection(
            f"amqps://{ARGS['host']}:{ARGS['port']}", timeout=STEP_SECS, ssl_domain=domain, virtual_host="localhost",
            **options,
        )  # fmt: skip
        self.connection = self._blocking.conn

    def wait(self, what, condition, secs=STEP_SECS):
        self._blocking.wait(condition, timeout=secs, msg=what)

    def attached(self, link):
        self.wait(f"{link.name} is attached", lambda: not link.state & Endpoint.REMOTE_UNINIT)
        # A refusal is an attach without a terminus, and a detach that raises its error.
        far = link.remote_target if link.is_sender else link.remote_source
        if far.address is None:
            self.wait(f"{link.name} is refused", lambda: False)
        return link

    def sender(self, address):
        return self.attached(self._blocking.container.create_sender(self.connection, address))

    def receiver(self, address, credit=0):
        link = self.attached(self._blocking.container.create_receiver(self.connection, address))
        if credit:
            link.flow(credit)
        return link

    def put_tokens(self, identities):
        """Fails unless each is taken; whom SASL has shown to the hub needs none."""
        if ARGS.get("sasl") == "PLAIN":
            return
        answers, requests = self.receiver("$cbs", len(identities)), self.sender("$cbs")
        self.wait("credit for tokens", lambda: requests.credit >= len(identities))
        for number, identity in enumerate(identities):
            properties = {
                "operation": "put-token", "type": "servicebus.windows.net:sastoken", "name": identity["audience"],
            }  # fmt: skip
            requests.send(
                Message(id=f"put-{number}", address="$cbs", reply_to="cbs", body=identity["token"], properties=properties)
            )
        taken = set()
        while len(taken) < len(identities):
            message, delivery = self.receive(answers)
            delivery.settle()
            assert message.properties["status-code"] == 200, message
            taken.add(message.correlation_id)

    def receive(self, link):
        self.wait(f"a message on {link.name}", lambda: link.current and not link.current.partial)
        message = Message()
        return message, message.recv(link)

    def send_all(self, link, count, make, meanwhile=lambda: None):
        """Sends numbered messages as far as credit goes; ends when the last is answered."""
        ends = dict.fromkeys(ENDS.values(), 0)
        waiting = collections.deque()
        sent = 0

        def step():
            nonlocal sent
            while sent < count and link.credit > 0 and len(waiting) < 5_000:
                waiting.append(link.send(make(sent)))
                sent += 1
            while waiting and waiting[0].settled:
                delivery = waiting.popleft()
                ends[ENDS[delivery.remote_state]] += 1
                delivery.settle()
            meanwhile()
            return sent == count and not waiting

        self.wait(f"{count} messages are answered", step, ARGS.get("secs", STEP_SECS))
        return ends

    def close(self):
        self._blocking.close()


def telemetry(body, marker, **properties):
    return Message(body=body.encode(), inferred=True, properties={"marker": marker, **properties})


def numbered(marker):
    return lambda number: telemetry(str(number), marker)


def pipeline(identity, marker, count, frame=None):
    client = Client(**({"max_frame_size": frame} if frame else {}))
    client.put_tokens([identity])
    tell(ends=client.send_all(client.sender(identity["events"]), count, numbered(marker)))
    client.close()


def frames(identity, receiver, marker, sizes):
    client = Client(max_frame_size=512)
    client.put_tokens([identity, receiver])
    source = client.receiver(receiver["inputs"], 10)
    bodies = []

    def take():
        while source.current and not source.current.partial:
            message = Message()
            delivery = message.recv(source)
            delivery.update(Delivery.ACCEPTED)
            delivery.settle()
            source.flow(1)
            bodies.append(bytes(message.body).decode())

    def make(number):
        return telemetry(str(number) * sizes[number], marker, filler="f" * 600)

    tell(ends=client.send_all(client.sender(identity["events"]), len(sizes), make, take))

    def complete():
        take()
        return len(bodies) == len(sizes)

    client.wait("all bodies", complete)
    tell(same=bodies == [str(number) * size for number, size in enumerate(sizes)])
    client.close()


def settle(delivery, outcome="accepted"):
    if outcome == "rejected":
        delivery.local.condition = Condition("test:bad", "not wanted")
    delivery.local.failed = outcome == "modified-failed"
    delivery.local.undeliverable = outcome == "modified-undeliverable"
    states = {name: state for state, name in ENDS.items()}
    delivery.update(states[outcome.partition("-")[0]])
    delivery.settle()


def credit(identity, receiver, marker, count):
    client = Client()
    client.put_tokens([identity, receiver])
    source, target = client.receiver(receiver["inputs"]), client.sender(identity["events"])
    tell(ends=client.send_all(target, count, numbered(marker)))
    bodies, unsettled = [], None
    for _ in range(count):
        source.flow(1)
        message, delivery = client.receive(source)
        bodies.append(int(bytes(message.body)))
        # The one before is settled only now: one is always under way.
        if unsettled:
            settle(unsettled)
        unsettled = delivery
    # More would have been too much: nothing came without credit.
    tell(bodies=bodies, credit=source.credit)
    source.drain(5)
    client.wait("the link is drained", lambda: not source.draining())
    tell(drained=source.credit)
    settle(unsettled)
    # After the drain, credit works as before.
    source.flow(1)
    client.send_all(target, 1, numbered(f"{marker}-again"))
    message, delivery = client.receive(source)
    settle(delivery)
    tell(again=message.properties["marker"])
    client.close()


def outcomes(identity, receiver, marker, plans):
    """Settles message N with the outcomes of its plan, one each time that it comes."""
    client = Client()
    client.put_tokens([identity, receiver])
    source = client.receiver(receiver["inputs"], 100)
    client.send_all(client.sender(identity["events"]), len(plans), numbered(marker))
    came = [0] * len(plans)
    while any(len(plan) > times for plan, times in zip(plans, came)):
        message, delivery = client.receive(source)
        number = int(bytes(message.body))
        assert came[number] < len(plans[number]), f"message {number} comes after {plans[number]}"
        settle(delivery, plans[number][came[number]])
        came[number] += 1
    tell(came=came)
    client.close()


def heartbeat(identity, marker, idle, beats):
    # The library asks for half of the time after which it gives up.
    client = Client(heartbeat=2 * idle / 1_000)
    client.put_tokens([identity])
    link = client.sender(identity["events"])
    client.wait("credit", lambda: link.credit > 0)
    transport = client.connection.transport
    before = transport.frames_input
    client.wait("heartbeats", lambda: transport.frames_input - before >= beats)
    tell(heard=transport.frames_input - before)
    tell(ends=client.send_all(link, 1, numbered(marker)))
    client.close()


def silence(idle):
    """Waits until the client gives the hub up, or is closed by it."""
    try:
        client = Client(heartbeat=2 * idle / 1_000)
        tell(opened=True)
        client.wait("an end", lambda: False)
    except ConnectionException as error:
        tell(end=str(error))


def refused(identity):
    try:
        client = Client()
        client.put_tokens([identity])
        client.sender(identity["events"])
        client.close()
    except LinkDetached as error:
        tell(condition=error.condition)
    except ConnectionException as error:
        tell(end=str(error))


VERBS = {
    "pipeline": pipeline, "frames": frames, "credit": credit, "outcomes": outcomes, "heartbeat": heartbeat,
    "silence": silence, "refused": refused,
}  # fmt: skip
OF_ALL = ("verb", "host", "port", "ca", "sasl", "secs")
VERBS[ARGS["verb"]](**{name: value for name, value in ARGS.items() if name not in OF_ALL})
