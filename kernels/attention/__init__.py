"""Scaled dot-product attention, forward and backward, without the matrix of scores in memory."""
