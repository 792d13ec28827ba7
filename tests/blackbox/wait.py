"""Waiting for conditions with deadlines. Nothing in the tests waits for time to pass."""

import time

DEADLINE_SECS = 90.0
PAUSE_SECS = 0.02


def until(what, probe, deadline_secs=DEADLINE_SECS):
    """Asks `probe` until its answer is true and returns that answer.

    Errors of the network mean "not yet". After the deadline the last answer or error is part of the message.
    """
    end = time.monotonic() + deadline_secs
    while True:
        try:
            answer = probe()
            if answer:
                return answer
        except OSError as error:
            answer = error
        if time.monotonic() > end:
            raise AssertionError(f"not within {deadline_secs} s: {what}; last: {answer!r}")
        time.sleep(PAUSE_SECS)
