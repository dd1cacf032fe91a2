"""The Redis broker, taken from without a gap: kombu's transport with other ways to take, acknowledge and give back.

Keys, queue items and the ``unacked`` entries are kombu's, so stock producers and workers share the queues.

- A message is moved from its queue to ``unacked`` by one script, several at a time where there is credit. kombu pops it
  first and writes it down second; killed in between, it loses it.
- Acknowledgements ride in the next such script. A crash before that redelivers, which custody recognises.
- An idle worker is told of new messages (client-side caching's invalidations) instead of popping blindly.
- What a worker holds is given back when its lease as an *owner* ends, not only after the visibility timeout.
- An item that is no message is handed up with its bytes, to become a dead letter; stock workers die of it.

Rejected: ``BLMOVE q q``, which waits for one key only, where kombu has four a queue; parsing items in Lua to find their
routing, because the queue an item came from is where it goes back to.
"""
