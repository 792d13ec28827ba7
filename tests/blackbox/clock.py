"""A clock of a program's own, set while the program runs: libfaketime, preloaded. Time that only passes stays the machine's."""

from pathlib import Path

LIBRARIES = "lib/*/faketime/libfaketimeMT.so.1"


class Clock:
    """The wall clock of all programs that have its variables, in days and hours off the machine's."""

    def __init__(self, folder: Path):
        self._file = folder / "clock"
        found = [path for root in ("/usr", "/") for path in Path(root).glob(LIBRARIES)]
        assert found, "no libfaketime: run `make setup-tests`, or install Debian's faketime"
        self._library = found[0]
        self.set()

    def variables(self):
        return {
            "LD_PRELOAD": self._library,
            "FAKETIME_TIMESTAMP_FILE": self._file,
            # The file is looked at for every look at the clock.
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "DONT_FAKE_MONOTONIC": "1",
        }

    def set(self, off="+0"):
        """For example `-365d` or `+2h`; right, if not told."""
        written = self._file.with_suffix(".new")
        written.write_text(off)
        written.replace(self._file)
