"""The public Python SDK, pointed at a hub of a test; unmodified, but that it calls a handler once at a time."""

import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from types import SimpleNamespace

from azure.iot.device import IoTHubDeviceClient, IoTHubModuleClient, Message
from azure.iot.device import aio
from azure.iot.device.iothub import sync_handler_manager

from . import wait

RETRY_SECS = 1
SHUTDOWN_SECS = 5

# The SDK calls each handler on four threads, so that calls overtake each other on a busy machine: whether messages came in
# their order could not be seen.
sync_handler_manager.concurrent = SimpleNamespace(
    futures=SimpleNamespace(ThreadPoolExecutor=lambda max_workers: ThreadPoolExecutor(1))
)


def message(body, properties=None, content_type=None, content_encoding=None, message_id=None):
    made = Message(body, message_id=message_id, content_encoding=content_encoding, content_type=content_type)
    made.custom_properties.update(properties or {})
    return made


def json_message(body, properties=None):
    return message(body, properties, "application/json", "utf-8")


def _client(kinds, site, identity, **options):
    kind = kinds[1] if identity.module else kinds[0]
    return kind.create_from_connection_string(
        identity.connection_string(gateway=site.address), server_verification_cert=site.root_pem,
        connection_retry_interval=RETRY_SECS, **options,
    )  # fmt: skip


@contextmanager
def client(site, identity, connect=True, **options):
    """A synchronous client. `send_message` returns when the hub has acknowledged."""
    made = _client((IoTHubDeviceClient, IoTHubModuleClient), site, identity, **options)
    try:
        if connect:
            made.connect()
        yield made
    finally:
        # The SDK waits for ever here when its network thread has died (see `send_within`).
        ending = threading.Thread(target=made.shutdown, daemon=True)
        ending.start()
        ending.join(SHUTDOWN_SECS)


def wait_twins(site, identity):
    """Returns when the hub has twins of the cloud. Before, one that nobody knows is empty, with version 0."""
    with client(site, identity) as made:
        wait.until("twins come from the cloud", lambda: made.get_twin()["desired"]["$version"] > 0)


@contextmanager
def receiver(site, identity, handler, **options):
    """A module that receives its inputs.

    The handler is there before the connection: a stored session delivers at once, and the SDK acknowledges and
    throws away what comes while it has no handler.
    """
    with client(site, identity, connect=False, **options) as made:
        made.on_message_received = handler  # connects
        yield made


class Stuck(Exception):
    """The SDK neither delivers nor fails."""


def send_within(client, made, secs):
    """Sends; raises what the SDK raises, or `Stuck`.

    A write into a TLS connection whose other end is gone ends the network thread of paho-mqtt 1.6.1 (it does not
    expect SSLEOFError), and with it the client: applications must watch for that, and so must tests that kill.
    """
    outcome = queue.Queue()

    def send():
        try:
            outcome.put(client.send_message(made))
        except Exception as error:  # pylint: disable=broad-except
            outcome.put(error)

    threading.Thread(target=send, daemon=True).start()
    try:
        error = outcome.get(timeout=secs)
    except queue.Empty:
        raise Stuck() from None
    if error is not None:
        raise error


@asynccontextmanager
async def async_client(site, identity):
    """An asynchronous client, for many messages in flight."""
    made = _client((aio.IoTHubDeviceClient, aio.IoTHubModuleClient), site, identity)
    try:
        await made.connect()
        yield made
    finally:
        await made.shutdown()
