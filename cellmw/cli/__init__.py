# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""``cellmw-manage``: looking at and changing what the API database holds."""
