"""Learning-rate schedules refined by the gradient norms of a finished run.

    norms = read_norms("runs/first", "l1")            # train.gradient_norms was on
    factors = refined_schedule(norms, power=1)        # in [0, 1]; 0 at the end

For the last iterate of a gradient method whose updates are weighted by w_t, the step sizes

    eta_t = w_t (w_{t+1} + ... + w_T)

have the best known bound where w_t = |g_t|^-2 for SGD (l2 norms) and |g_t|^-1 for methods that
scale coordinates, such as Adam (l1 norms); equal norms give linear decay to 0. From norms as runs
have them come a warm-up and a decay of the run's own shape (Defazio et al. 2023, arXiv 2310.07831,
theorem 1 and algorithm 1). The theorem asks for weights that do not depend on the gradients: of a
refined schedule it is a heuristic.
"""

import os

import numpy as np
import scipy.ndimage
from etils import epath
from jaxtyping import Float

from tilescan.training.metrics import read_rows
from tilescan.training.trained import saved_settings

POWERS = {"l2": 2, "l1": 1}  # of the norms that suit SGD, and Adam


def refined_schedule(
    norms: Float[np.ndarray, " T"], power: int, *, tau: float = 0.1, steps: int | None = None
) -> Float[np.ndarray, " S"]:
    """Returns the refined schedule as factors of a peak: at most 1, and 0 for the last update.

    Args:
      norms: of the gradient of every update of a run, above 0.
      power: weights are norms to minus this power; 2 for SGD, 1 for Adam.
      tau: width of the median filter, as a share of the updates.
      steps: updates of the schedule, S; None takes T. Norms are interpolated to another length.

    Raises:
      ValueError: norms that are not above 0 and finite, fewer than two updates, or tau outside
        [0, 1].
    """
    norms = np.asarray(norms, np.float64)
    if norms.ndim != 1 or len(norms) < 2:
        raise ValueError(f"norms must be [T] with T of at least 2, got shape {norms.shape}")
    if not np.all(norms > 0) or not np.all(norms < np.inf):
        at = int(np.argmin((norms > 0) & (norms < np.inf)))
        raise ValueError(f"norms must be above 0 and finite; that of update {at} is {norms[at]}")
    if not 0 <= tau <= 1:
        raise ValueError(f"tau={tau} must lie in [0, 1]")
    smooth = smoothed(norms, tau)
    if steps is not None and steps != len(norms):
        if steps < 2:
            raise ValueError(f"steps={steps} must be at least 2")
        smooth = np.interp(np.linspace(0, 1, steps), np.linspace(0, 1, len(smooth)), smooth)
    weights = (smooth / smooth.min()) ** -float(power)
    later = np.append(np.cumsum(weights[:0:-1])[::-1], 0.0)  # of the updates after each
    found = weights * later
    return found / found.max()


def smoothed(norms: Float[np.ndarray, " T"], tau: float) -> Float[np.ndarray, " T"]:
    """Returns norms after a median filter of a share tau of them, reflected at the end."""
    width = 2 * (int(tau * len(norms)) // 2) + 1
    padded = np.pad(norms, (0, 2 * width), mode="reflect")
    return scipy.ndimage.median_filter(padded, size=width, mode="nearest")[: len(norms)]


def read_norms(workdir: str | os.PathLike, norm: str) -> Float[np.ndarray, " T"]:
    """Reads the norms, "l2" or "l1", of every update of a run in its work folder.

    Raises:
      ValueError: another norm, no norms in the folder, or not those of every update.
    """
    if norm not in POWERS:
        raise ValueError(f"norm={norm!r} must be one of {', '.join(POWERS)}")
    path = epath.Path(workdir) / "gradient_norms.jsonl"
    rows = read_rows(path)
    if not rows:
        raise ValueError(f"{path} holds no norms: train with --config.train.gradient_norms=True")
    steps = [row["step"] for row in rows]
    if steps != list(range(1, len(steps) + 1)):
        raise ValueError(
            f"{path} begins with step {steps[0]} and has {len(steps)} up to {steps[-1]}: norms of "
            "all steps are needed, so train.gradient_norms must be on from the first"
        )
    if len(steps) < (asked := saved_settings(workdir).train.steps):
        raise ValueError(
            f"{path} has norms of {len(steps)} of the run's {asked} updates: let it finish"
        )
    return np.array([row[norm] for row in rows])


def norm_for(workdir: str | os.PathLike) -> str:
    """Returns the norm that suits a run's optimizer: "l2" for sgd, else "l1".

    Raises:
      ValueError: a folder without a run.
    """
    return "l2" if saved_settings(workdir).optimizer.name == "sgd" else "l1"
