"""A machine that publishes release after release: `python -m tests.registry.publishing_process URI HOME ROUNDS`.

Each is judged against the champion that there was when the round began. It prints a line when it is ready, waits for
one, and prints one when it is done.
"""

import random
import shutil
import sys
import time
from pathlib import Path

from registry.family import find, publish
from registry.home import Home
from tests.registry.workshop import Workshop, judged

FAMILY = "race"


def main() -> None:
    """Publish as often as told, the local index lost now and then."""
    uri, root, rounds = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    workshop = Workshop(Home.at(root, uri))
    workshop.recorder.warm_up()
    chance = random.Random(root.name)
    print("ready", flush=True)
    sys.stdin.readline()
    for number in range(rounds):
        execution = workshop.begin(FAMILY)
        model = workshop.model(f"{root.name} {number}".encode())
        members = [("merged", model.digest, execution.record(workshop.step("merged", model)))]
        family = find(workshop.home, FAMILY)
        against = family.aliases.get("champion") if family else None
        time.sleep(chance.random() / 20)
        if chance.random() < 0.3:
            shutil.rmtree(workshop.home.index, ignore_errors=True)
        publish(execution, FAMILY, members, judged(against))
        execution.finish()
    print("done", flush=True)


if __name__ == "__main__":
    main()
