"""Masks after the last token of a step alone."""

from heads import masks

Model = masks.Model


class Head(masks.MaskHead):
    """MaskHead in linear decoding. Training is the same."""

    quadratic = False
