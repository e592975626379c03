# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""What is known of cells, and of which instance is in which cell."""
