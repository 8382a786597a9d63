"""Masks after every token of a step."""

from heads.masks import MaskHead


class Head(MaskHead):
    """MaskHead in quadratic decoding."""

    quadratic = True
