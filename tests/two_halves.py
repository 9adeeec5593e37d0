"""Run the tests in two processes side by side: those that start Ray, which mostly wait, and meanwhile the others.

python tests/two_halves.py: the tests with Ray are seen while they run, and what the others said comes after them. The
others run with a lower priority, so that jobs whose times are looked at get the processors when they want them.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile

PYTEST = [sys.executable, "-m", "pytest"]
USUAL = "not weights and not models"  # as pyproject.toml has it, which -m takes the place of


def main() -> int:
    """The exit status: 0 only if both halves passed."""
    with tempfile.TemporaryFile() as said:
        nicely = ["nice", "-n", "10", *PYTEST, "-p", "no:cacheprovider", "-m", f"{USUAL} and not ray"]
        others = subprocess.Popen(nicely, stdout=said, stderr=subprocess.STDOUT)
        print("The tests that start Ray; the others run meanwhile and are shown below.", flush=True)
        with_ray = subprocess.Popen([*PYTEST, "--durations=12", "-m", f"{USUAL} and ray"])
        statuses = [ended(with_ray), ended(others)]
        said.seek(0)
        sys.stdout.buffer.write(said.read())
        for half, status in zip(("that start Ray", "that do not"), statuses, strict=True):
            how = "passed" if status == 0 else f"failed (exit status {status}; a negative one is the signal it died of)"
            print(f"The tests {half} {how}.")
        sys.stdout.flush()
    return next((status for status in statuses if status), 0)


def ended(process: subprocess.Popen[bytes]) -> int:
    """Its exit status. Ctrl-C reaches it, too, and it has things to clear away."""
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


if __name__ == "__main__":
    sys.exit(main())
