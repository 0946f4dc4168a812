"""Every drill there is, in the order in which they run."""

from drills import contention, crashes, due, lost_temporal, points, poison, redemptions, same_keys, terminations

DRILLS = (
    points.DRILL,
    crashes.DRILL,
    lost_temporal.DRILL,
    terminations.DRILL,
    due.DRILL,
    redemptions.DRILL,
    same_keys.DRILL,
    poison.DRILL,
    contention.DRILL,
)
