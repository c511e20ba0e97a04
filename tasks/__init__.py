"""Tasks - when a thing is made, where, and again if it fails.

The only rooms that know prefect and mlflow are this one and flows/.
"""
