"""Event files of TensorBoard, read back without it."""

from tensorboardX.proto import event_pb2


def read_events(directory):
    """The events of all files in a directory, in order."""
    events = []
    for path in sorted(directory.glob("events.out.tfevents.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            events.append(event_pb2.Event.FromString(data[at + 12 : at + 12 + size]))
            at += 12 + size + 4
    return events


def read_values(directory):
    """Tag -> list of (step, value) of all summaries."""
    found = {}
    for event in read_events(directory):
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value))
    return found
