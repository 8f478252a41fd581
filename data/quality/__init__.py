"""Quality checks on a case and between cases: pure functions of volumes that are read only once.

``digest`` condenses a volume to a few megabytes; ``volume`` judges one contrast, ``contrasts`` those of one case
together, ``labels`` the label map, ``cases`` the cases of a data set together. Each threshold is a constant next to
its check, and was set on real cases and phantoms with a margin on both sides, so that a healthy scan raises no problem.
"""
