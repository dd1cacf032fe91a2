"""The demo: real workers, a real broker and a flaky bank, sabotaged while they work, and every order accounted for.

It proves with the bank's own books and not with ours: an order is what a customer sees, charged once, or not charged
and visibly so.
"""
