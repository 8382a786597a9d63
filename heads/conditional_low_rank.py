"""`conditional` with the components of `low_rank`."""

from heads import low_rank
from heads.conditional import Given


class Head(Given, low_rank.Head):
    pass
