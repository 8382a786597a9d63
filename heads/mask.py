"""Masks after every token of a step."""

from heads import masks

Model = masks.Model


class Head(masks.MaskHead):
    """MaskHead in quadratic decoding."""

    quadratic = True
