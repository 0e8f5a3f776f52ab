"""Floor 5: the ways of stepping, each behind one protocol (``protocol``).

Adam (``adam``, Eq. 2), L-BFGS (``lbfgs/``, Algorithms 1 and 2), and on minibatches a living metric
(``living/``); which of them is meant where nothing is said (``modes``), what a step is told
(``told``), which follows which, with what state (``succession``), and how a state goes on in a more
exact dtype (``conversion``).
May touch objective/, switch/, curvature/, search/, vector/ and kernels/.
"""
