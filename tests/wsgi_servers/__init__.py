# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The sample pipeline over HTTP, under the servers that people run."""
