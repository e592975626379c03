# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""What 10,000 cells cost a process that knows none of them yet.

The API database is a list in memory, so the times are this package's own.  The
first answer is that of ``Directory.cell``; its bound is 50 microseconds for
each cell that is known.  Behind it a thread expands the cells that nobody has
asked for, and makes their credentials known.  Both are printed for passwords
of letters and digits, and for such as must be encoded.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import uuid
from unittest import mock

from oslo_config import cfg

from benchmarks.redaction import secret_urls
from cellmw import options
from cellmw.cells import engines, store
from cellmw.cells.mapping import CellMapping
from cellmw.redaction import KNOWN
from cellmw.runtime import Runtime
from cellmw.transports import oslo

BOUND = 50e-6


def rows_of(number: int, *, odd: bool) -> list[CellMapping]:
    made = []
    for index in range(number):
        transport_url, database_connection = secret_urls(index, odd=odd)
        made.append(
            CellMapping(
                id=index + 1,
                uuid=str(uuid.UUID(int=index + 1)),
                name=f"cell-{index}",
                transport_url=transport_url,
                database_connection=database_connection,
            )
        )
    return made


def run(number: int, *, odd: bool) -> None:
    rows = rows_of(number, odd=odd)
    # The store's query is the database's time, not ours.
    patch = mock.patch.object(store.Store, "cells", return_value=rows)
    patch.start()
    conf = cfg.ConfigOpts()
    conf([], project="cellmw-benchmark", default_config_files=[])
    oslo.prepare(conf)
    engines.register_options(conf)
    runtime = Runtime(options.load(conf, {}), conf)
    directory = runtime.process().directory
    known = len(KNOWN)
    began, processor = time.perf_counter(), time.process_time()
    assert directory.cell(rows[-1].uuid) is not None
    first = time.perf_counter() - began
    while len(KNOWN) < known + 2 * number:
        time.sleep(0.01)
    cell = (time.process_time() - processor) / number
    print(
        f"{number} cells, {'odd' if odd else 'plain'} passwords: "
        f"first answer after {first * 1e3:.0f} ms, "
        f"{first / number * 1e6:.1f} us a cell (bound {BOUND * 1e6:.0f}: "
        f"{'met' if first <= BOUND * number else 'MISSED'}); "
        f"{cell * 1e6:.0f} us of the processor a cell until all are known"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=10_000)
    parser.add_argument("--odd", action="store_true")
    args = parser.parse_args()
    run(args.cells, odd=args.odd)
    if not args.odd:
        # In a process that knows none of these cells.
        command = [sys.executable, "-m", "benchmarks.redaction_cold", "--odd"]
        subprocess.run([*command, f"--cells={args.cells}"], check=True)


if __name__ == "__main__":
    main()
