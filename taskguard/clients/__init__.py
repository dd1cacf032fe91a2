"""Guards inside HTTP clients: `clients.httpx` and `clients.requests`, each with the extra of its name.

A client built with one of them is guarded wherever it is used, also where the call is made by a library. What both do
is said once, in `budgets`.
"""
