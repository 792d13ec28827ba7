"""A raw AMQP client (uAMQP): one JSON object with its arguments on the standard input, the verb among them.

What it tells are JSON lines on the standard output; it ends by itself. Verbs and arguments are those of `tests/node/raw.js`.
"""

import json
import logging
import sys
from datetime import timedelta

import uamqp
from uamqp import authentication

ARGS = json.load(sys.stdin)
TOKEN_SECS = 3_600
ENDS = {uamqp.constants.MessageState.SendComplete: "accepted", uamqp.constants.MessageState.SendFailed: "rejected"}


def tell(**what):
    print(json.dumps(what), flush=True)


class Token(authentication.SASTokenAuth):
    """A token that is renewed as soon as it is taken, as long as there are others."""

    def __init__(self, identity):
        super().__init__(
            identity["audience"], address(identity), identity["token"], port=ARGS["port"], verify=ARGS["ca"],
            expires_in=timedelta(seconds=TOKEN_SECS), refresh_window=2 * TOKEN_SECS if "tokens" in identity else 0,
        )  # fmt: skip
        self.others = list(identity.get("tokens", ()))

    def update_token(self):
        # The library puts no token again.
        self._prev_token = self.token
        if self.others:
            self.token = self.others.pop(0).encode()


def address(identity):
    return f"amqps://{ARGS['host']}{identity['events']}"


def send(identity, messages):
    auth = Token(identity)
    # The trace of frames takes longer than they do.
    client = uamqp.SendClient(address(identity), auth=auth, debug="tokens" in identity)
    try:
        client.open()
        while auth.others or not client.client_ready():
            client.client_ready()
        for message in messages:
            client.queue_message(message)
        states = client.send_all_messages(close_on_done=False)
    finally:
        client.close()
    ends = {"accepted": 0, "rejected": 0, "released": 0, "modified": 0}
    for state in states:
        ends[ENDS[state]] += 1
    tell(ends=ends, retries=auth.retries)


def numbered(marker, count):
    for number in range(count):
        yield marked(uamqp.Message(str(number).encode()), marker)


def marked(message, marker):
    message.application_properties = {b"marker": marker.encode()}
    return message


def pipeline(identity, marker, count):
    """With all the tokens that the identity has, one after the other."""
    send(identity, numbered(marker, count))


def batch(identity, marker, count):
    """All messages in one transfer, in the message format of batches."""
    send(identity, [uamqp.BatchMessage(numbered(marker, count))])


logging.basicConfig(stream=sys.stderr, level=logging.INFO)
VERBS = {"pipeline": pipeline, "batch": batch}
OF_ALL = ("verb", "host", "port", "ca", "sasl", "secs")
VERBS[ARGS["verb"]](**{name: value for name, value in ARGS.items() if name not in OF_ALL})
