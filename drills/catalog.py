"""Every drill there is, in the order in which they run."""

from drills import contention, crashes, lost_temporal, points, poison, same_keys, terminations

DRILLS = (
    points.DRILL,
    crashes.DRILL,
    lost_temporal.DRILL,
    terminations.DRILL,
    same_keys.DRILL,
    poison.DRILL,
    contention.DRILL,
)
