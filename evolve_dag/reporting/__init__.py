"""Tables, figures and pages over a lineage.

Here: what people look at. Not here: numbers that are not stored already, MLflow.
"""
