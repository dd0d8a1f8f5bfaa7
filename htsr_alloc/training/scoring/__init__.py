"""Scores of a model's linears, from weights or from data, for ``allocate`` (extra ``train``)."""
