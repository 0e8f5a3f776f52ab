"""Published results on PINNs and fits beside ours: ``python -m benchmarks.published``.

- ``rows``: what was published, with settings and sources, and what we run beside it;
- ``networks``, ``pinns``: networks with derivatives carried forward, equations as losses;
- ``poisson_heat``, ``transport``, ``resampled``, ``nist``: the problems; each ``build`` makes one;
- ``course``: a run's closure, which counts and notes; ``baselines`` and ``ours``: the methods;
- ``compare``, ``page``: what follows from the runs, in tables, words and pictures.
"""
