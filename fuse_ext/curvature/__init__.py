"""Floor 3: what is known of the objective's curvature.

The ring of pairs that -H g is made from (``ring``, Algorithm 2), pairs of block means for
minibatches (``block_pairs``), Adam's moments (``moments``, Eq. 2) with their step counts
(``step_counts``), and the metric that they leave to L-BFGS (``metric``). What any other H, such as
a dense matrix, has to answer is in ``protocol``. May touch vector/ and kernels/.
"""
