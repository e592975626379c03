# Licensed under the Apache License, Version 2.0; see the file LICENSE.
"""``cellmw-demo``: an API service with three cells, on one machine.

The service is in :mod:`~cellmw.demo.api` and :mod:`~cellmw.demo.rpcapi`, as
a user of this package writes one.  What a real site has around it is in
:mod:`~cellmw.demo.hosts`, :mod:`~cellmw.demo.keystone`,
:mod:`~cellmw.demo.brokers` and :mod:`~cellmw.demo.database`;
:mod:`~cellmw.demo.site` puts it all up and takes it down again.
:mod:`~cellmw.demo.check` is ``--check``.
"""
