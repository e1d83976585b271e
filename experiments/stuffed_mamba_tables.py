"""Tables, claims and figures of "Stuffed Mamba"."""

NONE = "none"
FORGET = "forget more, remember less"
WINDOW = "sliding window by state difference"
NORM = "state normalisation"
HALF_STEP = "half step size"


def tables(records):
    return []


def claims(records):
    return []


def figures(records):
    return {}
