"""The table of faults: what was shown meanwhile, and how soon the first message was settled after each. Printed at the end."""

ROWS = []
REMARKS = []


def note(fault, shown, first_secs, all_secs, count):
    ROWS.append((fault, shown, f"{first_secs:.2f}", f"{all_secs:.2f}", str(count)))


def say(remark):
    REMARKS.append(remark)


def table():
    head = ("fault", "shown meanwhile", "first settled, s", "all settled, s", "messages")
    rows = [head, tuple("-" * len(word) for word in head), *ROWS]
    widths = [max(len(row[at]) for row in rows) for at in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows] + REMARKS
