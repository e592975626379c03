# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""What is open: transports, who has them on lease, and how they end."""
