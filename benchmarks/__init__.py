# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""What the package costs, measured against what it stands on.

Each module here is a command: ``python -m benchmarks.NAME`` takes its own
measurements in one run, and prints them as ratios with their spread.
``python -m benchmarks`` runs them all, or those that are named.
"""
