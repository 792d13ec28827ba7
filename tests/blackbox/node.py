"""The public Node SDK, unmodified, installed once below `target/`."""

import os
import shutil
import subprocess
import threading

from . import wait
from .process import REPOSITORY

SOURCE = REPOSITORY / "tests" / "node"
INSTALL_SECS = 300
RUN_SECS = 180


def modules():
    """The folder of the installed packages; that they cannot be had is a failure with its reason."""
    folder = REPOSITORY / "target" / "node"
    stamp, lock = folder / "installed.json", SOURCE / "package-lock.json"
    if stamp.is_file() and stamp.read_bytes() == lock.read_bytes():
        return folder / "node_modules"
    for tool in ("node", "npm"):
        assert shutil.which(tool), f"{tool} is not installed: the tests with the Node SDK need it"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("package.json", "package-lock.json"):
        shutil.copy(SOURCE / name, folder / name)
    done = subprocess.run(
        ["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"], cwd=folder, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=INSTALL_SECS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"the Node SDK cannot be installed:\n{done.stdout[-2000:]}"
    # Written last: an interrupted installation is repeated.
    shutil.copy(lock, stamp)
    return folder / "node_modules"


def service(connection_string, root_file, transport, *arguments):
    """One run of the service SDK; the lines that it tells."""
    done = subprocess.run(
        ["node", str(SOURCE / "service.js"), transport, connection_string, *arguments],
        env={"PATH": os.environ["PATH"], "NODE_PATH": str(modules()), "NODE_EXTRA_CA_CERTS": str(root_file)},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        timeout=RUN_SECS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout.splitlines()


class Client:
    """A running SDK client; what it tells is in `lines`."""

    def __init__(self, site, transport, identity, verb, count, marker):
        self._start("client.js", site, transport, identity, verb, count, marker)

    def _start(self, program, site, transport, identity, *arguments):
        arguments = [transport, identity.connection_string(gateway=site.address), site.authority.root, *arguments]
        self.lines = []
        self._child = subprocess.Popen(
            ["node", str(SOURCE / program), *map(str, arguments)],
            env={"PATH": os.environ["PATH"], "NODE_PATH": str(modules())},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self._child.stdout:
            self.lines.append(line.rstrip("\n"))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._child.poll() is None:
            self._child.kill()
        self._child.wait()
        self._reader.join()
        self._child.stdout.close()

    def wait_line(self, text):
        wait.until(f"the Node client tells {text!r}", lambda: self._alive_or_told(text))

    def _alive_or_told(self, text):
        if text in self.lines:
            return True
        assert self._child.poll() in (None, 0), "\n".join(self.lines)
        return False

    def wait_end(self):
        """All that it told; its end must be a good one."""
        code = self._child.wait(timeout=RUN_SECS)
        self._reader.join()
        assert code == 0, "\n".join(self.lines)
        return self.lines


class Control(Client):
    """A running SDK client that reports, hears of changed properties, and answers the method `reboot`."""

    def __init__(self, site, transport, identity):  # pylint: disable=super-init-not-called
        self._start("control.js", site, transport, identity)
