"""Break things while readers in several processes compare every byte; nothing but errors may come of it.

For each scenario a number of rounds: an empty cache, a fresh mount of an image of random content, readers, the
fault at a random moment, and everything well again afterwards. Exit status 1 if there was one wrong byte, a
read that hung, a mount that did not come back, or an error that neither the log nor the fault itself explains.
A run is repeated by its seed, as far as scheduling lets it.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from crashes.content import Content, make_content
from crashes.disk import small_disk
from crashes.machine import RESIDENT, Machine
from crashes.readers import Failure, WrongBytes
from crashes.registry import SwitchedRegistry, switched_registry
from crashes.rounds import Round
from crashes.scenarios import SCENARIOS, Scenario
from crashes.verdict import Outcome
from mounts import keep_mounts_private

#: How long a read waits for the registry: shorter than usual, so that errors are seen.
READ_DEADLINE_S = 2
BACKENDS = (RESIDENT, "erofs-fuse")
#: Runs where Python starts, before any module of veneer: spans of mounted devices may be evicted after this
#: time, not after a minute.
_HASTY_S = 0.5
_HASTY = f"""from veneer.store.owned import IdleRule
IdleRule.__init__.__defaults__ = ({_HASTY_S}, *IdleRule.__init__.__defaults__[1:])
"""
_ROW = "{:19} {:15} {:>6} {:>6} {:>9} {:>8} {:>7} {:>11} {:>5} {:>5}  {}"
_COLUMNS = ("rounds", "faults", "reads", "MB", "errors", "unexplained", "wrong", "s")


class Matrix:
    """All that the scenarios share."""

    def __init__(self, options: argparse.Namespace, content: Content, registry: SwitchedRegistry) -> None:
        self._options = options
        self._directory: Path = options.directory
        self._content = content
        self._registry = registry

    def run(self, name: str, scenario: Scenario, backend: str) -> Outcome:
        """All rounds of one scenario, until one fails."""
        outcome = Outcome(name, backend, self._options.seed)
        began = time.monotonic()
        with ExitStack() as stack:
            place = self._directory / f"{name}-{backend}"
            disk = None
            if scenario.disk:
                size = int(self._content.size * scenario.disk) + (16 << 20)
                disk = stack.enter_context(small_disk(self._directory, size))
            machine = stack.enter_context(self._machine(place, scenario, backend))
            if disk:
                machine.cache_dir = disk.directory / "cache"
            for number in range(self._options.rounds):
                round_ = Round(
                    number,
                    machine,
                    self._registry,
                    self._content,
                    outcome,
                    readers=self._options.readers,
                    allowed=scenario.causes,
                    disk=disk,
                    damaged=scenario.damages,
                )
                try:
                    round_.begin()
                    scenario.act(round_)
                    round_.end()
                except Failure as failure:
                    outcome.failure = f"round {number}: {failure}"
                    outcome.wrong += isinstance(failure, WrongBytes)
                finally:
                    round_.account()
                if not outcome.ok:
                    self._keep(outcome, machine)
                    break
            else:
                machine.stop()
        outcome.seconds = time.monotonic() - began
        return outcome

    @contextmanager
    def _machine(self, place: Path, scenario: Scenario, backend: str) -> Iterator[Machine]:
        environment = {"VENEER_READ_DEADLINE": str(READ_DEADLINE_S)}
        if scenario.quota:
            environment["VENEER_CACHE_QUOTA"] = str(int(self._content.size * scenario.quota))
        if scenario.hasty:
            (place / "hasty").mkdir(parents=True, exist_ok=True)
            (place / "hasty/sitecustomize.py").write_text(_HASTY)
            paths = (f"{place}/hasty", os.environ.get("PYTHONPATH", ""))
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        machine = Machine(place, backend, f"{self._registry.host}/image:lazy", environment)
        try:
            yield machine
        finally:
            machine.close()

    def _keep(self, outcome: Outcome, machine: Machine) -> None:
        """The log of a failure is worth more than a clean directory."""
        kept = self._directory / f"{outcome.scenario}-{outcome.backend}.log"
        kept.write_text(machine.log())
        outcome.failure += f"\n(see the log in {kept})"


def show(outcome: Outcome) -> None:
    """One row of the table, with the errors below it."""
    errors = sum(outcome.errors.values())
    sizes = (f"{outcome.reads:,}", f"{outcome.bytes / 1e6:,.0f}", f"{errors:,}")
    counts = (
        outcome.rounds,
        outcome.faults,
        *sizes,
        outcome.unexplained,
        outcome.wrong,
        f"{outcome.seconds:.0f}",
    )
    print(_ROW.format(outcome.scenario, outcome.backend, *counts, "ok" if outcome.ok else "FAILED"))
    for (name, cause), count in sorted(outcome.errors.items()):
        print(f"    {count:6} {name}: {cause}")
    for note, count in sorted(outcome.notes.items()):
        print(f"    {count:6} {note}")
    for example in outcome.examples:
        print(f"    {example}")
    if outcome.failure:
        print("    " + outcome.failure.replace("\n", "\n    "))
    sys.stdout.flush()


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    about = "\n".join(f"  {name:20} {scenario.about}" for name, scenario in SCENARIOS.items())
    parser = argparse.ArgumentParser(
        prog="scripts/crash-matrix",
        description=__doc__,
        epilog=f"scenarios:\n{about}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "scenario", nargs="*", choices=[*SCENARIOS, []], metavar="SCENARIO", help="default: all"
    )
    parser.add_argument("--rounds", type=int, default=10, help="rounds of each scenario (default 10)")
    parser.add_argument("--seed", type=int, help="repeats a run (default: another each time)")
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="default: both; may be repeated")
    parser.add_argument("--size", type=int, default=48, metavar="MIB", help="of the content (default 48)")
    parser.add_argument("--readers", type=int, default=6, help="processes that read (default 6)")
    parser.add_argument(
        "--directory", type=Path, default=Path("build/crash-matrix"), help="for everything made"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcome there too")
    options = parser.parse_args(arguments)
    options.seed = random.SystemRandom().randrange(1 << 32) if options.seed is None else options.seed
    options.directory = options.directory.absolute()
    return options


def main() -> int:
    """Run the scenarios that were asked for."""
    options = parse(sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    directory: Path = options.directory
    if directory.exists():
        sys.exit(f"{directory} exists: another run, or the logs of a failed one")
    directory.mkdir(parents=True)
    outcomes = []
    try:
        content = make_content(directory, options.size << 20, options.seed)
        maker = Machine(directory / "convert", "", "", {})
        maker.veneer("convert", f"oci:{content.layout}:source", f"oci:{directory}/registry/image:lazy")
        maker.close()
        shutil.rmtree(content.layout)
        about = f"{len(content.files):,} files, {content.size / 1e6:.0f} MB, {options.readers} readers"
        print(f"# seed {options.seed}: {about}")
        print(_ROW.format("scenario", "backend", *_COLUMNS, ""), flush=True)
        with switched_registry(directory / "registry") as registry:
            matrix = Matrix(options, content, registry)
            for name in options.scenario or SCENARIOS:
                for backend in options.backend or BACKENDS:
                    if backend in SCENARIOS[name].backends:
                        outcomes.append(matrix.run(name, SCENARIOS[name], backend))
                        show(outcomes[-1])
    finally:
        for path in directory.iterdir():
            if path.suffix != ".log":
                shutil.rmtree(path)
        if not any(directory.iterdir()):
            directory.rmdir()
    if options.json:
        options.json.write_text(json.dumps([outcome.to_json() for outcome in outcomes], indent=1))
    return 0 if all(outcome.ok for outcome in outcomes) else 1


if __name__ == "__main__":
    os.chdir(Path(__file__).parents[1])
    keep_mounts_private()
    sys.exit(main())
