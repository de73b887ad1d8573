"""Learning-rate schedules, as pure functions of the step: resuming does not change them."""

import math
from collections.abc import Callable

from muomni.config.run import OptimSection

# Fraction of the decay that is left at progress `x`, 0 <= x <= 1.
_DECAYS: dict[str, Callable[[float], float]] = {
    "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
    "1-sqrt": lambda x: 1 - math.sqrt(x),
    "linear": lambda x: 1 - x,
}


def lr_factor(step: int, num_steps: int, optim: OptimSection) -> float:
    """Learning rate after `step` of `num_steps` finished steps, as a fraction of the peak.

    Linear warmup, then decay to `final_lr_fraction` at the last step: cosine over all remaining steps
    (Loshchilov and Hutter, 2017), or after a stable phase (`wsd`: Hu et al., 2024, MiniCPM; `1-sqrt`:
    Hägele et al., 2024).
    """
    num_warmup = round(optim.warmup_fraction * num_steps)
    if step < num_warmup:
        return (step + 1) / num_warmup
    if optim.schedule == "constant":
        return 1.0
    last_at_peak, shape = num_warmup, "cosine"
    if optim.schedule == "wsd":
        num_decay = round(optim.decay_fraction * num_steps)
        # Even the shortest run has one step at the peak.
        last_at_peak = max(0, num_warmup - 1, num_steps - num_decay - 1)
        shape = optim.decay_shape
    progress = (step - last_at_peak) / max(1, num_steps - 1 - last_at_peak)
    decayed = _DECAYS[shape](min(1.0, max(0.0, progress)))
    return optim.final_lr_fraction + (1 - optim.final_lr_fraction) * decayed
