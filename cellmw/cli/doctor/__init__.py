# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""``cellmw-manage doctor``: what is wrong with a service's set-up.

Each check is a function that yields :class:`~cellmw.cli.doctor.findings
.Finding` objects, a good one included, and changes nothing.
"""
