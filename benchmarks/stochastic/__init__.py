"""FusePV on minibatches beside first-order methods: ``python -m benchmarks.stochastic``.

- ``images``: the printed and tuned learning rates of Table II; ``ablation``: one option at a time;
- ``task``: what an optimizer is put to; ``image_task``, ``text_task`` (with ``transformer``) build
  one, ``training`` runs any optimizer on any of them;
- ``tasks``: which there are; ``methods``: who takes part, and the control in Adam's metric;
- ``tournament``: tuning, runs at equal steps and at equal cost; ``duels``: who wins, in words;
- ``change``: other data from half of a run on; ``page``, ``pictures``: the results.
"""
