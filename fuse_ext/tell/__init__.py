"""Floor 5: what an optimizer tells of itself.

The report of what was done and why (``report``), a record of it step by step (``record``), how to
reach both through a trainer's wrapper (``unwrap``), the counts that it draws on and that are saved
with the state (``log``), and the table of what an optimizer holds (``memory``).
May touch objective/, curvature/, search/ and vector/; it reads phases through its own protocol.
"""
