"""A process of the built program with its log on disk."""

import os
import signal
import subprocess
from pathlib import Path

from . import wait

REPOSITORY = Path(__file__).resolve().parents[2]
STOP_SECS = 60


def program():
    """The program under test; its absence is a failure, never a reason to skip."""
    path = Path(os.environ.get("EDGEHUB_PROGRAM", REPOSITORY / "target/debug/edgehub"))
    if not path.is_file():
        raise AssertionError(f"the program {path} is not built: run `make test`, or set EDGEHUB_PROGRAM")
    return str(path)


def environment(variables):
    """Nothing of the caller's settings reaches the program."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "RUST_BACKTRACE") if name in os.environ}
    return {**kept, "RUST_BACKTRACE": "1", **{name: str(value) for name, value in variables.items()}}


def run(arguments, variables=None, deadline_secs=90):
    """Runs the program to its end."""
    return subprocess.run(
        [program(), *map(str, arguments)], env=environment(variables or {}), stdin=subprocess.DEVNULL,
        capture_output=True, text=True, errors="replace", timeout=deadline_secs, check=False,
    )  # fmt: skip


class Process:
    """A running program. Everything that it prints is in `log`."""

    def __init__(self, name, arguments, variables, log: Path, inside=()):
        """`inside` begins the command: a program that becomes ours."""
        self.name = name
        self.log = log
        with log.open("ab") as output:
            self._child = subprocess.Popen(
                [*inside, program(), *map(str, arguments)], env=environment(variables), stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip

    @property
    def pid(self):
        return self._child.pid

    def resident_bytes(self):
        """Its memory that is not swapped out."""
        for line in Path(f"/proc/{self.pid}/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise AssertionError(f"{self.name} has no VmRSS")

    def running(self):
        return self._child.poll() is None

    def text(self):
        return self.log.read_text(errors="replace")

    def wait_ready(self, what, probe):
        """Waits until `probe` is true; an early end of the process is reported at once with its log."""

        def step():
            if not self.running():
                code = self._child.returncode
                raise AssertionError(f"{self.name} ended with {code} before {what}:\n{self.text()[-4000:]}")
            return probe()

        try:
            return wait.until(f"{self.name}: {what}", step)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.text()[-4000:]}") from None

    def kill(self):
        """SIGKILL: what a power switch does to a process."""
        self._child.kill()
        self._child.wait(STOP_SECS)

    def stop(self):
        """SIGTERM, and the exit code."""
        if self.running():
            self._child.send_signal(signal.SIGTERM)
        try:
            return self._child.wait(STOP_SECS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{self.name} does not stop within {STOP_SECS} s:\n{self.text()[-4000:]}") from None

    def assert_no_panic(self):
        text = self.text()
        assert "panicked" not in text, f"{self.name} panicked:\n{text[-6000:]}"
