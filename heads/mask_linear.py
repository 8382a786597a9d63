"""Masks after the last token of a step alone."""

from heads.masks import MaskHead


class Head(MaskHead):
    """MaskHead in linear decoding. Training is the same."""

    quadratic = False
