"""The stages' common code, one subject per file; docs/tour.md says in which order to read them.

Nothing here imports a stage (model.py is none: it is what all stages are about), and there is no circle.
"""
