"""Floor 2: the parameters as one logical vector that nobody has to move.

Where each parameter lies in it and which of them take part in a step (``flat``), what of it lies on
this rank (``shards``), norms of gradients (``gradients``), numbers that all ranks agree on
(``measures``, ``ranks``), the ops with their sums over ranks (``reduced_ops``), and the checks of
the tensors themselves (``checks``). State is flat and ours, parameters stay the user's.
May touch kernels/ alone, and of the compiled module the layout that C++ knows.
"""
