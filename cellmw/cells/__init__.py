# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""The API database: cells, instances, and the caches of both."""
