"""How targeting and rate move over training. Pure functions."""

RAMPS = ("none", "linear", "paper")

# The authors' code ramps the targeting to this share of its end in the first half of the steps, and to the end in the
# second (github.com/for-ai/TD, the `_piecewise` dropouts); the rate rises evenly over both.
_KNEE = 0.95


def ramp_factors(kind: str, step: int, steps: int | None) -> tuple[float, float]:
    """What targeting and rate are multiplied by at a step.

    Args:
        kind: "none": both by 1; "linear": both rise evenly from 0 to 1; "paper": the targeting from 0 to .95 in the
            first half of the steps and on to 1 in the second, the rate evenly.
        step: Optimizer step, from 0.
        steps: Length of the ramp; from there on both are 1. A ramp needs it.

    Returns:
        Of the targeting, of the rate.

    Raises:
        ValueError: For an unknown ramp, or one without a length.
    """
    if kind not in RAMPS:
        raise ValueError(f"ramp={kind!r}: expected one of {', '.join(RAMPS)}.")
    if kind == "none":
        return 1.0, 1.0
    if steps is None:
        raise ValueError(
            f"ramp={kind!r} needs a length: set ramp_steps, or max_steps of hf_efx.step_context(model), which a "
            f"Trainer does by itself."
        )
    share = min(step / steps, 1.0)
    if kind == "linear":
        return share, share
    return (2 * _KNEE * share if share <= 0.5 else _KNEE + (2 * share - 1) * (1 - _KNEE)), share
