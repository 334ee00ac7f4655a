"""Stop a run by signals, and survive the end of a program that reads its output."""

import errno
import signal
import sys

from common import drop_output
from distributed import world_size


def catch_signals():
    """Return a list that collects later signals: Ctrl-C, SIGTERM, SIGHUP, or a closed pipe of stdout as SIGTERM.

    Replaces sys.stdout by a Console.
    """
    signals, numbers = [], [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # not on Windows or under nohup
        numbers.append(signal.SIGHUP)

    def request_stop(number, frame):
        if number == signal.SIGINT and number in signals and world_size() == 1:
            raise KeyboardInterrupt  # the second Ctrl-C ends one process immediately; torchrun sends several itself
        signals.append(number)

    for number in numbers:
        signal.signal(number, request_stop)
    sys.stdout = Console(sys.stdout, lambda: signals.append(signal.SIGTERM))
    return signals


class Console:
    """stdout that a run survives: if its reader ends, such as `tee` after Ctrl-C, call `on_close` and drop the output.

    Output to a closed terminal is dropped too, but the run continues.
    """

    def __init__(self, stream, on_close):
        self.stream, self.on_close = stream, on_close

    def write(self, text):
        self.guard(self.stream.write, text)

    def flush(self):
        self.guard(self.stream.flush)

    def guard(self, function, *args):
        try:
            function(*args)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            if error.errno == errno.EPIPE:
                self.on_close()
            drop_output(self.stream)

    def __getattr__(self, name):
        return getattr(self.stream, name)
