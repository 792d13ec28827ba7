"""A device or module of the public Node SDK, driven from here: commands in, answers and events out."""

import itertools
import json
import os
import subprocess
import threading

from . import node, wait


class Refused(Exception):
    """The SDK says that a command failed."""


class Device:
    """A running SDK client over `mqtt`, `amqp` or `amqp-ws`. What it tells is in `told`, oldest first."""

    def __init__(self, site, transport, identity):
        arguments = [transport, identity.connection_string(gateway=site.address), site.authority.root]
        self.told = []
        self._numbers = itertools.count()
        self._child = subprocess.Popen(
            ["node", str(node.SOURCE / "device.js"), *map(str, arguments)],
            env={"PATH": os.environ["PATH"], "NODE_PATH": str(node.modules())},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self._child.stdout:
            try:
                self.told.append(json.loads(line))
            except ValueError:
                self.told.append({"event": "text", "text": line})

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._child.poll() is None:
            self._child.kill()
        self._child.wait()
        self._reader.join()
        self._child.stdin.close()
        self._child.stdout.close()

    def start(self, verb, **arguments):
        """Begins a command; its number."""
        number = next(self._numbers)
        self._child.stdin.write(json.dumps({"id": number, "do": verb, **arguments}) + "\n")
        self._child.stdin.flush()
        return number

    def result(self, number):
        """Waits for the end of a command; what it brought, or `Refused`."""
        answer = self._wait(f"the end of command {number}", lambda told: told.get("done") == number)
        if "error" in answer:
            raise Refused(answer["error"])
        return answer["result"]

    def do(self, verb, **arguments):
        return self.result(self.start(verb, **arguments))

    def events(self, kind):
        return [told for told in list(self.told) if told.get("event") == kind]

    def wait_event(self, kind, **wanted):
        """The first event of that kind with these members."""
        return self._wait(
            f"{kind} with {wanted}",
            lambda told: told.get("event") == kind and all(told.get(name) == value for name, value in wanted.items()),
        )

    def _wait(self, what, matches):
        def probe():
            return next((told for told in list(self.told) if matches(told)), None) or self._must_run()

        try:
            return wait.until(f"the Node client tells {what}", probe)
        except AssertionError as error:
            raise AssertionError(f"{error}; it told {self.told[-20:]}") from None

    def _must_run(self):
        assert self._child.poll() is None, f"the Node client ended with {self._child.returncode}: {self.told[-20:]}"
