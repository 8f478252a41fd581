"""What can be wrong with a case or between cases: pure judgements on volumes that were read once.

``digest`` makes of a volume what is kept of it, a few megabytes; ``volume`` judges one contrast, ``contrasts`` those of
one case together, ``labels`` the label map, ``cases`` the cases of a data set together. Thresholds are constants beside
the judgement they belong to; each was set on real cases and phantoms with room to both sides, so that a healthy scan
raises no problem.
"""

from data.quality.finding import Finding, Kind, Severity

__all__ = ["Finding", "Kind", "Severity"]
