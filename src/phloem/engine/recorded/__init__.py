"""Recorded steps: which are recorded and when (`graphs`), and the three ways of serving a step by one.

`decode` holds a step of one token a row at fixed numbers of rows, `flexible` any step up to its largest sizes, `pieces`
prefill and mixed steps around an eager attention; `choice` decides which of them an engine has.
"""
