# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""Run all benchmarks, or those that are named."""

from __future__ import annotations

import argparse
import pkgutil
import subprocess
import sys

import benchmarks


def main() -> int:
    names = sorted(
        module.name
        for module in pkgutil.iter_modules(benchmarks.__path__)
        if not module.name.startswith("_")
    )
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__
    )
    parser.add_argument(
        "name", nargs="*", help=f"one of: {', '.join(names) or 'none yet'}"
    )
    chosen = parser.parse_args().name or names
    if unknown := sorted(set(chosen) - set(names)):
        parser.error(f"there is no benchmark {', '.join(unknown)}")
    failed = []
    # A process for each: what one imports and opens must not show in another.
    for name in chosen:
        print(f"== {name}", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{name}"]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
