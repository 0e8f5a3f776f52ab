"""Floor 4: the closure as a function that is to become small.

What a step is told (``step_options``), the closure's values and what is remembered of them
(``evaluations``), trials along a direction and the way back (``trials``), where they had better
begin (``usual_step``), whether the closure is one function (``watch``), what came of it
(``progress``) and what did not (``setbacks``).
May touch curvature/, search/, vector/ and kernels/.
"""
